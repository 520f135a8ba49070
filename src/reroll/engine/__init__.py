"""Engines: requests in, events out; token ids only, no tokenizer inside."""
