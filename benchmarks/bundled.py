"""What is measured of the bundled model, of its plain-attention twin, and of the twin fine-tuned.

Each is a command of ``landmark eval`` whose rows are one file of ``benchmarks/results``;
``run_all.py`` runs them. The twin is no part of the package; it is made again by

    landmark train --data books --out out/twin --config recipes/bundled.json --plain \\
        --tokenizer src/landmark/bundled/landmark

and the fine-tuned one by

    landmark train --data books --out out/tuned --model out/twin --config recipes/finetune.json \\
        --max-seconds 100
"""

from __future__ import annotations

EVAL = "-m landmark.cli.app eval"
FILLERS = {"paper": "paper", "books": "{data}/test", "pydoc": "pydoc"}
EVERY_FILLER = f"--filler {','.join(FILLERS.values())}"
PASSKEY = f"{EVAL} passkey --trials 50 --read retrieve"
MILLION = f"{EVAL} passkey --lengths 1048576"
PERPLEXITY = (
    f"{EVAL} perplexity --data {{data}} --lengths 512,2048,4096 --max-tokens 524288 "
    "--compare {twin}"
)
PLAIN = f"{EVAL} passkey --trials 50 {EVERY_FILLER} --model {{twin}} --lengths 512,2048,8192,32768"
TUNED = f"{PASSKEY} {EVERY_FILLER} --model {{tuned}} --lengths 32768 --top-k 2,4"


def commands() -> dict[str, str]:
    """Returns the arguments of Python for each result.

    ``{data}``, ``{twin}`` and ``{tuned}`` stand for the folders of texts and of the two models.
    """
    found = {}
    for name, filler in FILLERS.items():
        found[f"bundled-passkey-{name}"] = (
            f"{PASSKEY} --filler {filler} --lengths 512,8192,32768,131072 --top-k 2,4"
        )
        found[f"bundled-million-{name}"] = (
            f"{MILLION} --trials 20 --filler {filler} --top-k 2,4 --read local"
        )
    found["bundled-million-retrieve"] = (
        f"{MILLION} --trials 5 --filler {{data}}/test --top-k 4 --read retrieve"
    )
    found["bundled-granularity"] = (
        f"{PASSKEY} {EVERY_FILLER} --lengths 32768 --granularity head,group,token"
    )
    found["bundled-facts"] = (
        f"{EVAL} passkey --trials 25 --read retrieve --filler {{data}}/test "
        "--facts 1,2,4,8,16,64 --lengths 8192,32768"
    )
    found["bundled-facts-million"] = (
        f"{MILLION} --trials 5 --filler {{data}}/test --facts 20 --top-k 4 --read local"
    )
    found["bundled-recall"] = (
        f"{EVAL} recall --trials 20 --filler {{data}}/test --facts 16,64 --lengths 32768"
    )
    found["bundled-perplexity-190"] = f"{PERPLEXITY} --local 190 --top-k 2,0 --window 320"
    found["bundled-perplexity-paper"] = (
        f"{PERPLEXITY} --local 250,350 --blocks 40 --top-k 0,2,4 --window 448"
    )
    found["bundled-perplexity-blocks"] = (
        f"{PERPLEXITY} --scheme blocks --top-k 0,1,2,3,4,8 --window 384"
    )
    found["twin-passkey"] = f"{PLAIN} --window 384"
    found["twin-dynamic"] = f"{PLAIN} --rope dynamic:2"
    found["tuned-passkey"] = TUNED
    return found
