"""Answer a question about every picture of a folder with Ray Data, and write a table.

    python deploy/examples/ray_data.py PICTURES OUT

Files are read where they are answered: what travels is their encoded bytes.
"""

import sys

import ray

from mcv_runtime import ColumnAnswerer


def main(pictures: str, out: str) -> None:
    ray.init(include_dashboard=False, log_to_driver=False)
    workers = max(int(ray.cluster_resources()["CPU"]) - 1, 1)  # one core is left to who reads and writes: they wait for it else
    files = ray.data.read_binary_files(pictures, include_paths=True).rename_columns({"bytes": "image"})
    answered = files.map_batches(
        ColumnAnswerer,
        fn_constructor_kwargs={"prompt": "What does the text say?", "options": {"max_new_tokens": 20}},
        batch_size=16,
        num_cpus=1,  # and with it the threads of each
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    answered.drop_columns(["image"]).write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
