"""The report on a dataset: one HTML page that needs nothing else, no network and no scripts."""

#: What a page of ours has near its start.
MARK = '<meta name="generator" content="loraport dataset stats">'
