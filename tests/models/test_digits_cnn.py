"""The demo network learns the digits in seconds."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from qexp.data.digits import Digits
from qexp.models.digits_cnn import DigitsCNN


@pytest.mark.slow
def test_digits_cnn_reaches_98_percent_of_the_test_split():
    torch.manual_seed(0)
    net, data, epochs = DigitsCNN(), Digits(augment={"padding": 1}), 30
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert hits >= 490
