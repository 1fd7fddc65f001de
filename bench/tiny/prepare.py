"""Trains the tokenizer and writes the tokens of the training and the validation split.

The tokenizer sees the training text only, so that the validation numbers are of text nothing here
has seen. PubMedQA is small (500 abstracts) but is the quickstart's domain, so each of its training
abstracts is repeated a few times per MedQuAD epoch.
"""

import argparse
import json

import numpy as np
from corpus import WORK, abstract, data_argument, medquad, pair, pubmedqa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

END = "<|endoftext|>"
VOCABULARY = 4096
REPEAT_PUBMEDQA = 4
SEED = 20240601


def train_tokenizer(texts, folder):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Without the whole byte alphabet a character unseen in training could not be encoded at all.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    bpe.model.save(str(folder))
    # The class BioMedLM names too: every transformers version reads it. Like BioMedLM there is no
    # pad token.
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_prefix_space": False,
    }
    config |= {"model_max_length": 512, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    data_argument(parser)
    data = parser.parse_args().data
    WORK.mkdir(exist_ok=True)

    documents, held_documents = medquad(data)
    answers = [pair(row) for row in documents]
    held_answers = [pair(row) for row in held_documents]
    abstracts = [abstract(row) for row in pubmedqa(data, "train")]
    held_contexts = ["\n".join(row["contexts"]) for row in pubmedqa(data, "test")]
    tokenizer = train_tokenizer(answers + abstracts, WORK / "tokenizer")

    def tokens(texts):
        return [
            np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)
            for ids in tokenizer(texts, verbose=False)["input_ids"]
        ]

    training = tokens(answers) + tokens(abstracts) * REPEAT_PUBMEDQA
    order = np.random.default_rng(SEED).permutation(len(training))
    np.save(WORK / "train.npy", np.concatenate([training[index] for index in order]))
    held = {"medquad_held_out": held_answers, "pubmedqa_test_contexts": held_contexts}
    counts = {
        "train": sum(map(len, training)),
        "medquad_rows": len(answers),
        "pubmedqa_abstracts": len(abstracts),
    }
    for name, texts in held.items():
        np.save(WORK / f"{name}.npy", np.concatenate(tokens(texts)))
        counts[name] = {"texts": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    (WORK / "held_out.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
