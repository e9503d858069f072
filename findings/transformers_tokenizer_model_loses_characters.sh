#!/bin/bash
# Guess before running: AutoTokenizer (tokenizer_class LlamaTokenizer) gives the ids of sentencepiece's own tokenizer.model,
# apart from its normalisation and a leading space.
#
# Seen with sentencepiece 0.2.3 (identity normalisation) and transformers 4.57.6 and 5.23.0: 4.57.6 gives the same ids,
# 5.23.0 reads every such model as Llama's, BPE with bytes for unknown characters. Where the model has no bytes, unknown
# characters disappear; of a unigram model's words only letters are left. Nothing is raised or logged.
#   model, text             sentencepiece, 4.57.6        5.23.0                     and decoded
#   BPE, bytes, "zip"       ▁ <0x7A> i <0x70>            ▁ <0x7A> i <0x70>          zip
#   BPE, "zip"              ▁ <unk> i <unk>              ▁ i                        i
#   BPE, "newer (low)"      ▁newer ▁ <unk> lo w <unk>    ▁newer ▁low                newer low
#   unigram, "zip"          ▁ <unk> i <unk>              ▁ i                        i
#   unigram, "widest"       ▁widest                      ▁ w i d e s t              widest
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
for pins in "transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2" \
  "transformers==5.23.0 huggingface_hub==2.4.0 tokenizers==0.23.3"; do
  # shellcheck disable=SC2086
  "$folder/venv/bin/pip" --disable-pip-version-check install --quiet \
    $pins sentencepiece==0.2.3 protobuf==7.36.2 numpy==2.4.6
  HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - "$(mktemp -d -p "$folder")" <<'PYTHON'
import json
import pathlib
import sys

import sentencepiece
import transformers

root = pathlib.Path(sys.argv[1])
words = ["low lower lowest new newer newest wide wider widest"] * 50


def pieces(name, text, **settings):
    """sentencepiece's pieces, transformers', and the text that those decode to."""
    folder = root / name
    if not folder.exists():
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_prefix=str(folder / "tokenizer"),
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    own, theirs = (" ".join(model.id_to_piece(i) for i in some) for some in (model.encode(text), ids))
    return own, theirs, tokenizer.decode(ids)


bpe_bytes = {"model_type": "bpe", "vocab_size": 290, "byte_fallback": True}
bpe, unigram = {"model_type": "bpe", "vocab_size": 34}, {"model_type": "unigram", "vocab_size": 34}
cases = [
    ("BPE, bytes", bpe_bytes, "zip", "▁ <0x7A> i <0x70>", "▁ <0x7A> i <0x70>", "zip"),
    ("BPE", bpe, "zip", "▁ <unk> i <unk>", "▁ i", "i"),
    ("BPE", bpe, "newer (low)", "▁newer ▁ <unk> lo w <unk>", "▁newer ▁low", "newer low"),
    ("unigram", unigram, "zip", "▁ <unk> i <unk>", "▁ i", "i"),
    ("unigram", unigram, "widest", "▁widest", "▁ w i d e s t", "widest"),
]
five = transformers.__version__.startswith("5.")
print(f"transformers {transformers.__version__}")
changed = False
for name, settings, text, own, of_five, decoded in cases:
    seen = pieces(name, text, **settings)
    print(f"  {name}, {text!r}: {' / '.join(seen)}")
    changed |= seen[:2] != (own, of_five if five else own) or (five and seen[2] != decoded)
sys.exit(changed)
PYTHON
done
