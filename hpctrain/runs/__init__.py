"""A run on disk and on screen: folder, checkpoints, stop requests, record, progress.

Only `checkpoint`, `snapshot` and `restore` import torch (`tensorboard` too, once it is used).
Nothing imports MPI and nothing communicates: what the ranks must agree on goes as a few numbers
into the loop's control all-reduce (a maximum over the ranks).
"""
