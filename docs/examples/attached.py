"""The same script on many ranks: `mpirun -n 2 python docs/examples/attached.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hpctrain

torch.manual_seed(0)
digits = load_digits()
inputs = torch.tensor(digits.images / 16, dtype=torch.float32)
targets = torch.tensor(digits.target)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

with hpctrain.attach(model, optimizer) as sync:
    for _epoch in range(15):
        for indices in torch.randperm(1500).split(100):
            mine = indices[sync.rank :: sync.size]
            loss = F.cross_entropy(model(inputs[mine]), targets[mine])
            sync.backward(loss, samples=len(mine))
            sync.step()

accuracy = (model(inputs[1500:]).argmax(1) == targets[1500:]).float().mean()
if sync.rank == 0:
    print(f"held-out accuracy {accuracy:.3f}")
