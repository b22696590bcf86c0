"""The digest of a shard's index, in a module that starts fast: conversion workers import it."""

from __future__ import annotations

import xxhash


def index_digest(head: bytes, table: bytes) -> str:
    """XXH3-64 of what a shard says about its samples, labels included: cheap to check when opening.

    `head` is the file up to the end of the metadata, `table` its allocation table. The images have
    digests of their own.
    """
    return xxhash.xxh3_64_hexdigest(head + table)
