"""Answer a question about every picture of a folder with Spark, and write a table; a bundle is opened once a task.

python deploy/examples/pandas_udf.py PICTURES OUT
"""

import sys
from collections.abc import Iterator

import pandas as pd

from mcv_runtime import ColumnAnswerer

SCHEMA = "path string, answer string, stop_reason string, tokens long, prompt_tokens long, error string"


def answer(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """For `mapInPandas`: frames with the columns path and content."""
    answerer = ColumnAnswerer(prompt="What does the text say?", options={"max_new_tokens": 20}, threads=1)
    for frame in frames:
        columns = answerer({"image": frame["content"].tolist(), "path": frame["path"].tolist()})
        del columns["image"]
        yield pd.DataFrame(columns)


def main(pictures: str, out: str) -> None:
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[2]").getOrCreate()
    files = spark.read.format("binaryFile").load(pictures).select("path", "content")
    files.mapInPandas(answer, SCHEMA).write.parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
