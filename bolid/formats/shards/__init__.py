"""Shards: tar files of samples in WebDataset's layout, and the directory that makes them count.

A directory holds ``shard-000000.tar``, ... and ``index.json``, which is written last: without it the directory is
unfinished. Members of a sample share a key ``<person>/<sha256[:16]>`` (no dot after the slash):

    <key>.jpg           the photo; <key>.png, cropped to the person, in training shards
    <key>.json          width, height, box, person, source, ... (``Sample.meta``)
    <key>.txt           the caption
    <key>.safetensors   every tensor of the sample in one file: at least ``keypoints`` f32 [17, 3] (x, y, confidence;
                        pixels of the stored photo), ``face`` f32 [512] where a face is found, ``image_embed``,
                        ``view_features``; training shards also hold ``latents`` f16 [2, C, h, w] (mean, std)

Plain ``webdataset`` reads the tars; give it ``.map(decode_sample)``, never its own ``.decode()``, which runs pickles.
Times and owners are left out, so equal samples give equal bytes.

While a directory is being written, ``journal.jsonl`` lists the finished tars, synced line by line. A kill costs the tar
in progress and nothing else: the same command makes a ``ShardWriter`` again, skips its ``done_keys`` and
``done_rejects``, and ends with the same bytes as an uninterrupted run.

Every directory may also be a URL of an object store, ``s3://bucket/shards`` (bolid/formats/storage.py).
"""

from __future__ import annotations

from bolid.formats.images import decode_image
from bolid.formats.shards.reading import (
    INDEX,
    JOURNAL,
    ShardReader,
    directory_sha256,
    group_by_person,
    read_index,
    read_shards,
)
from bolid.formats.shards.removal import remove_person, samples_of
from bolid.formats.shards.samples import Sample, decode_sample, sample_key
from bolid.formats.shards.writing import DEFAULT_MAX_BYTES, ShardWriter

__all__ = [
    "DEFAULT_MAX_BYTES", "INDEX", "JOURNAL", "Sample", "ShardReader", "ShardWriter", "decode_image", "decode_sample",
    "directory_sha256", "group_by_person", "read_index", "read_shards", "remove_person", "sample_key", "samples_of",
]  # fmt: skip
