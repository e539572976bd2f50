"""Answer a question about every picture of a data set of Hugging Face's, and write a table.

    python deploy/examples/datasets_map.py PICTURES OUT.parquet

Pictures stay encoded (`decode=False`): the runtime decodes them as a model wants it.
"""

import sys

from datasets import Image, load_dataset

from mcv_runtime import ColumnAnswerer


def main(pictures: str, out: str) -> None:
    rows = load_dataset("imagefolder", data_dir=pictures, split="train").cast_column("image", Image(decode=False))
    answerer = ColumnAnswerer(prompt="What does the text say?", options={"max_new_tokens": 20})
    rows.map(answerer, batched=True, batch_size=16).remove_columns("image").to_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
