"""Rows that are read while training: `shards` are read from any place, `order` puts their rows in one order, `rows`
encodes them and numbers those that can be used, `handed_over` does the same with a stream of the caller's."""
