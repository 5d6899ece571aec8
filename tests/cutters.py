"""Real tokenizers of many kinds, trained on a few words: what models put before, behind and between
texts.
"""

import functools

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = (
    "The old man went down to the river, and it's 1234 steps.\n\n"
    "  He said: naïve café – 漢字 🙂👩‍👩‍👧!\r\n\tdef f(x):\n"
    "    return x  # comment\nThe rain the river the man  and 99 houses. THE END\n"
) * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]"]


def _bpe():
    return models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _core(model, trainer, normalizer=None, pre_tokenizer=None, decoder=None, **more):
    core = Tokenizer(model)
    for name, part in (
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
    ):
        if part is not None:
            setattr(core, name, part)
    core.train_from_iterator(
        TEXT.splitlines(keepends=True), trainer(special_tokens=SPECIAL, show_progress=False, **more)
    )
    return core


def _byte_level(prefix):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix)


def _bytes(prefix):
    return functools.partial(
        _core,
        models.BPE(),
        trainers.BpeTrainer,
        None,
        _byte_level(prefix),
        decoders.ByteLevel(),
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def _llama(prepend):
    """As Llama-2's: no words at all, spaces are written by a normalizer, the alphabet is as large
    as its bytes.
    """
    core = _bytes(False)()
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    replace = normalizers.Replace(" ", "▁")
    made = Tokenizer(_bpe())
    made.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    )
    trainer = trainers.BpeTrainer(
        special_tokens=[*SPECIAL, *alphabet],
        show_progress=False,
        vocab_size=560,
        max_token_length=12,
    )
    lines = [
        word
        for line in TEXT.splitlines()
        for word in pre_tokenizers.Split(" ", "merged_with_next").pre_tokenize_str(line)
    ]
    made.train_from_iterator([word for word, _ in lines], trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    del core
    return made


def _metaspace(kind, scheme, split=True, first=()):
    model, trainer = {
        "bpe": (_bpe(), trainers.BpeTrainer),
        "unigram": (
            models.Unigram(),
            functools.partial(trainers.UnigramTrainer, unk_token="<unk>"),
        ),
    }[kind]
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return functools.partial(
        _core,
        model,
        trainer,
        None,
        pre_tokenizers.Sequence([*first, space]) if first else space,
        decoders.Metaspace(prepend_scheme=scheme),
        vocab_size=300,
    )


DIGITS = pre_tokenizers.Split(
    Regex(r"\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+| ?[^\s\p{N}]+"), "isolated"
)

CUTTERS = {
    "bytes": _bytes(False),
    "bytes-prefix": _bytes(True),
    "bytes-digits": functools.partial(
        _core,
        models.BPE(),
        trainers.BpeTrainer,
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        decoders.ByteLevel(),
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
    "bytes-each-digit-prefix": functools.partial(
        _core,
        models.BPE(),
        trainers.BpeTrainer,
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]),
        decoders.ByteLevel(),
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
    "llama": functools.partial(_llama, True),
    "gemma": functools.partial(_llama, False),
    **{
        f"{kind}-{scheme}{'' if split else '-whole'}": _metaspace(kind, scheme, split)
        for kind in ("bpe", "unigram")
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "t5": _metaspace("unigram", "always", True, (pre_tokenizers.WhitespaceSplit(),)),
    "unigram-nfkc": functools.partial(
        _core,
        models.Unigram(),
        functools.partial(trainers.UnigramTrainer, unk_token="<unk>"),
        normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Lowercase()]
        ),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(),
        vocab_size=300,
    ),
    "words": functools.partial(
        _core,
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer,
        None,
        pre_tokenizers.Whitespace(),
    ),
    "words-strip": functools.partial(
        _core,
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer,
        normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()]),
        pre_tokenizers.Whitespace(),
    ),
    "bert": functools.partial(
        _core,
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        vocab_size=300,
    ),
}


def _template(single):
    names = {"<s>": 1, "</s>": 2, "[CLS]": 4, "[SEP]": 5}
    used = [(name, number) for name, number in names.items() if name in single]
    return processors.TemplateProcessing(single=single, special_tokens=used)


# Each with the ids that begin a row.
ENDS = {
    "none": (None, []),
    "bos": (_template("<s> $A"), [1]),
    "bos-eos": (_template("<s> $A </s>"), [1, 2][:1]),
    "eos": (_template("$A </s>"), []),
    "two": (_template("[CLS] <s> $A [SEP] </s>"), [4, 1]),
    "bytes": (processors.ByteLevel(trim_offsets=True), []),
    "bytes-bos-eos": (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), _template("<s> $A </s>")]),
        [1],
    ),
    "bert": (processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4)), [4]),
    "roberta": (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1]),
}


@functools.cache
def _made(name):
    return CUTTERS[name]().to_str()


def cutter(name, ends="none"):
    """A new tokenizer of a kind, with what it puts around every text."""
    core = Tokenizer.from_str(_made(name))
    if ENDS[ends][0] is not None:
        core.post_processor = ENDS[ends][0]
    return core
