"""Odd words, numbers and outputs that people give to commands, and where they give them."""

from __future__ import annotations

WORDS = {
    "no UTF-8": "caf\udce9",
    "half an emoji": "cut \ud83d off",
    "a control sequence": "\x1b[31mred\x07\r\n\x9b2J",
    "a zero character": "zero \0 in it",
    "brackets": "[/red] :smile: {0} %s $x_{",
    "the other direction": "\u202eabc \u200e\u200f\u061c",
    "nothing": "",
    "a space": " ",
    "an emoji": "\U0001f642",
    "a dash": "-",
    "an option": "--all",
    "a long word": "word " * 400,
}
ASKED = {
    "generate": ["generate", "WORD", "--model", "MARKED", "--max-new-tokens", "2"],
    "rank": ["rank", "WORD", "TEXT", "--model", "MARKED"],
    "explain": [
        "explain",
        "TEXT",
        "--question",
        "WORD",
        "--model",
        "MARKED",
        "--max-new-tokens",
        "2",
        "--out",
        "a.html",
    ],
    "ask": ["ask", "MEMORY", "WORD", "--max-new-tokens", "2"],
    "model": ["generate", "hi", "--model", "WORD"],
    "device": ["generate", "hi", "--model", "MARKED", "--device", "WORD"],
    "dtype": ["generate", "hi", "--model", "MARKED", "--dtype", "WORD"],
    "read": ["generate", "hi", "--model", "MARKED", "--read", "WORD"],
    "tier": ["remember", "TEXT", "--model", "MARKED", "--out", "memory", "--tier", "WORD"],
    "filler": ["eval", "passkey", "--model", "MARKED", "--lengths", "150", "--trials", "1", "--filler", "WORD"],
    "rope": ["eval", "passkey", "--model", "PLAIN", "--rope", "WORD"],
    "split": ["eval", "perplexity", "--model", "MARKED", "--data", "TEXT", "--lengths", "9999", "--split", "WORD"],
    "index": ["eval", "index", "--model", "MARKED", "--data", "TEXT", "--queries", "9999", "--index", "WORD"],
    "field": ["train", "--data", "TEXT", "--out", "o", "--model", "MARKED", "--length", "99999", "--field", "WORD"],
    "report": [
        "train",
        "--data",
        "TEXT",
        "--out",
        "o",
        "--model",
        "MARKED",
        "--length",
        "99999",
        "--report-to",
        "WORD",
    ],
    "command": ["WORD"],
}

NUMBERS = (
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e3",
    "9" * 20,
    "1e-300",
    "",
    " ",
    "0x10",
    "1,,2",
    "\u0663",
    "--",
    "\x1b[31m",
)
_PASSKEY = ["eval", "passkey", "--lengths", "150", "--trials", "1", "--filler", "TEXT"]
_PERPLEXITY = ["eval", "perplexity", "--data", "TEXT", "--lengths", "20", "--max-tokens", "40"]
_TRAIN = ["train", "--data", "TEXT", "--out", "tuned", "--model", "MARKED", "--length", "99999"]
COUNTED = {
    "--temperature --seed --max-new-tokens": ["generate", "hi", "--model", "MARKED", "--max-new-tokens", "2"],
    "--top": ["rank", "hi", "TEXT", "--model", "MARKED"],
    "--block-size --top-k --local-blocks --max-blocks --layers --chunk-tokens --trained-length": [
        *("convert", "PLAIN", "--out", "converted")
    ],
    "--top-k --facts --distractors --seed --lengths": [*_PASSKEY, "--model", "MARKED"],
    "--rope": [*_PASSKEY, "--model", "PLAIN"],
    "--window --plain-limit": [*_PASSKEY, "--model", "PLAIN"],
    "--local --blocks --top-k --local-blocks --seed": [*_PERPLEXITY, "--model", "MARKED"],
    "--passages --passage-tokens --max-tokens": ["eval", "rank", "--data", "TEXT", "--model", "MARKED"],
    "--landmarks --layer --max-tokens --queries": [
        "eval",
        "index",
        "--data",
        "TEXT",
        "--model",
        "MARKED",
        "--queries",
        "9999",
    ],
    "--steps --batch --lr --warmup --seed --episodes --answer-weight --vocab-size --block-size --top-k": _TRAIN,
    "--local-blocks --position-gap --micro-batch --workers --log-every --evaluate-every --save-every --lora": _TRAIN,
}
ROPES = ("dynamic:nan", "dynamic:inf", "dynamic:0", "dynamic:-1", "dynamic:1e400", "dynamic:x", "linear:2")
OPTIONS = {
    f"{words[0]} {words[1]} {option}": [*words, option] for names, words in COUNTED.items() for option in names.split()
}

OUTS = {  # paths below an empty folder with a file, a folder with something in it, and a link to itself
    "a folder": ("folder", False),
    "inside a file": ("file.txt/out.html", False),
    "inside a device": ("/dev/null/out.html", False),
    "where nothing can be made": ("/proc/out.html", False),
    "a link to itself": ("loop", False),
    "a name of 300 characters": ("n" * 300, False),
    "nothing": ("", False),
    "a point": (".", False),
    "a name that is no UTF-8": ("caf\udce9.html", None),
    "a name of control characters": ("\x1b[31m\r\n\u202e.html", None),
    "a name of brackets": ("[/red] [bold] $x_{.html", None),
    "a name with a dash": ("-out.html", None),
    "a new folder": ("new/er/out.html", None),
}
WRITING = {
    "explain": ["explain", "TEXT", "--question", "hi", "--model", "MARKED", "--max-new-tokens", "2", "--out"],
    "remember": ["remember", "TEXT", "--model", "MARKED", "--out"],
    "convert": ["convert", "PLAIN", "--out"],
    "passkey": [*_PASSKEY, "--model", "MARKED", "--out"],
    "perplexity": [*_PERPLEXITY, "--model", "MARKED", "--out"],
    "plot": [*_PERPLEXITY, "--model", "MARKED", "--plot"],
    "train": ["train", "--data", "TEXT", "--model", "MARKED", "--length", "99999", "--out"],
}
