"""A plain PyTorch training script: one process, digits, a small network."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
digits = load_digits()
inputs = torch.tensor(digits.images / 16, dtype=torch.float32)
targets = torch.tensor(digits.target)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

for _epoch in range(15):
    for indices in torch.randperm(1500).split(100):
        loss = F.cross_entropy(model(inputs[indices]), targets[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

accuracy = (model(inputs[1500:]).argmax(1) == targets[1500:]).float().mean()
print(f"held-out accuracy {accuracy:.3f}")
