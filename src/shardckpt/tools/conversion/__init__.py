"""Converters: from and to what other programs write, through files, so that no state has to fit into memory."""

from shardckpt.tools.conversion.converting import SHARD, ConvertReport, convert
from shardckpt.tools.conversion.formats import FORMATS, Format

__all__ = ["FORMATS", "SHARD", "ConvertReport", "Format", "convert"]
