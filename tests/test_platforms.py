"""Without ``fcntl``, as on Windows: the package and the operation are there, the memory says what
it needs.
"""

import subprocess
import sys

CODE = """
import importlib, sys, torch, transformers
sys.modules["fcntl"] = None
from landmark import landmark_attention
x = torch.ones(1, 1, 8, 4)
print(landmark_attention(x, x, x, block_size=4).shape)
for name in ("landmark.hf", "landmark.memory.archive.log", "landmark.texts.library"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
from landmark.cli.app import main
main(["ask", "memory", "question"])
"""


def test_without_posix_there_is_the_operation_and_one_line_about_the_memory():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    shape, *said = done.stdout.splitlines()
    assert shape == "torch.Size([1, 1, 8, 4])" and len(said) == 3
    for line in (*said, done.stderr.strip().removeprefix("error: ")):
        assert line.startswith("landmark's memory expects a POSIX system") and line.endswith(
            "use WSL"
        )
