"""The peer: what people write by hand with `hvd.DistributedOptimizer`.

As lean as such scripts get: the data set is one tensor and a batch one indexing operation.
"""

from __future__ import annotations

import argparse
import gzip
import os

import horovod.torch as hvd
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data.distributed import DistributedSampler

from benchmarks.gate import gated_cnn
from hpctrain.data.spec import Spec


def read_idx(path: str, offset: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=offset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--channels", type=int, nargs="+", required=True)
    parser.add_argument("--hidden", type=int, required=True)
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    images = read_idx(f"{args.data}/fashion-mnist/train-images-idx3-ubyte.gz", 16)
    labels = read_idx(f"{args.data}/fashion-mnist/train-labels-idx1-ubyte.gz", 8)
    images = torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    images = (images - images.mean()) / images.std()
    targets = torch.from_numpy(labels.astype(np.int64))
    sampler = DistributedSampler(images, hvd.size(), hvd.rank())
    batch_local = args.batch // hvd.size()

    model = gated_cnn(
        Spec("classification", (1, 28, 28), "float32", 10),
        block=args.block,
        folder=args.folder,
        job="plain",
        channels=args.channels,
        hidden=args.hidden,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    model.train()
    for epoch in range(10**6):
        sampler.set_epoch(epoch)
        for indices in torch.tensor(list(sampler)).split(batch_local):
            optimizer.zero_grad()
            F.cross_entropy(model(images[indices]), targets[indices]).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
