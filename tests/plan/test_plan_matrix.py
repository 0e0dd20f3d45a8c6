"""Layers and optimizers of many kinds. Building verifies the gradients, so a build is the test."""

import pytest
import torch
from torch import nn

from coordinator.plan.build import build
from coordinator.plan.task import Task
from edge_agent.plan_guard import check

pytestmark = pytest.mark.long


class Transformer(nn.Module):
    """Tokens, one encoder layer with dropout, mean, classes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class MaskedAttention(nn.Module):
    """Attention in which each place sees itself and those before it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """A GRU over 6 readings of 3 sensors."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def cnn(*norm):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)
    )


MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(16, 12)),
    "cnn": lambda: (cnn(), torch.randn(16, 1, 8, 8)),
    "cnn_group_norm": lambda: (cnn(nn.GroupNorm(2, 8)), torch.randn(16, 1, 8, 8)),
    "cnn_batch_norm": lambda: (cnn(nn.BatchNorm2d(8)), torch.randn(16, 1, 8, 8)),
    "cnn_dropout": lambda: (cnn(nn.Dropout2d(0.25)), torch.randn(16, 1, 8, 8)),
    "cnn_1d": lambda: (
        nn.Sequential(
            nn.Conv1d(3, 8, 5, stride=2, dilation=2),
            nn.SiLU(),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        ),
        torch.randn(16, 3, 24),
    ),
    "depthwise": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=4),
            nn.ReLU6(),
            nn.Conv2d(4, 8, 1, groups=2),
            nn.Flatten(),
            nn.Linear(288, 4),
        ),
        torch.randn(16, 4, 8, 8),
    ),
    "depthwise_strided": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 4),
        ),
        torch.randn(16, 4, 8, 8),
    ),
    "depthwise_1d": lambda: (
        nn.Sequential(
            nn.Conv1d(3, 3, 5, padding=2, groups=3),
            nn.Tanh(),
            nn.Conv1d(3, 4, 1),
            nn.Flatten(),
            nn.Linear(96, 4),
        ),
        torch.randn(16, 3, 24),
    ),
    "transposed": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(192, 4)
        ),
        torch.randn(16, 2, 4, 4),
    ),
    "transformer": lambda: (Transformer(), torch.randint(0, 50, (16, 5))),
    "masked_attention": lambda: (MaskedAttention(), torch.randn(16, 5, 8)),
    "gru": lambda: (Recurrent(), torch.randn(16, 6, 3)),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}
WIDE = [
    (model, optimizer, loss)
    for model in ("mlp", "cnn")
    for optimizer in ("sgd", "momentum", "adamw")
    for loss in ("cross_entropy", "mse")
]
DEEP = [(model, "momentum", "cross_entropy") for model in MODELS if model not in {"mlp", "cnn"}]
OTHER = [("mlp", optimizer, "cross_entropy") for optimizer in ("nesterov", "adam", "rmsprop", "adagrad")]


@pytest.mark.parametrize(("model_name", "optimizer_name", "loss_name"), [*WIDE, *DEEP, *OTHER])
def test_gradients_agree_with_float64_torch(model_name, optimizer_name, loss_name):
    torch.manual_seed(0)
    model, x = MODELS[model_name]()
    classes = loss_name == "cross_entropy"
    targets = torch.randint(0, 4, (16,)) if classes else torch.randn(16, 4)
    loss = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    built = build(Task(model, loss, optimizer, (x, targets), model_name, "accuracy" if classes else None))
    check(built.plan)
    verified = built.plan.manifest.verified
    print(
        f"{model_name} {optimizer_name} {loss_name}: median {verified.median_gradient_error:.1e}, "
        f"max {verified.max_gradient_error:.1e}, float32 torch max {verified.torch_float32_max_error:.1e}"
    )
    assert verified.median_gradient_error <= 2e-6


class TwoInputs(nn.Module):
    """A reading and a room number; a fixed table, a frozen layer and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.reading = nn.Linear(5, 8)
        self.room = nn.Embedding(10, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(requires_grad=False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 4)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, reading, room):
        return self.head(torch.tanh(self.frozen(self.reading(reading) + self.room(room) * self.table)))


def test_what_is_not_trained_stays_out_of_the_schema():
    torch.manual_seed(0)
    model = TwoInputs()
    example = ((torch.randn(16, 5), torch.randint(0, 10, (16,))), torch.randint(0, 4, (16,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    built = build(Task(model, nn.CrossEntropyLoss(), optimizer, example, "two inputs"))
    check(built.plan)
    names = {tensor.name.split(".")[1] for tensor in built.plan.manifest.schema.tensors}
    assert names == {"reading", "room", "head"}
    assert [tensor.shape for tensor in built.plan.manifest.inputs] == [(None, 5), (None,)]


LOSSES = {
    "weights_and_smoothing": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), label_smoothing=0.1
    ),
    "ignored_class": nn.CrossEntropyLoss(ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_variants_of_cross_entropy_agree_with_float64_torch(loss):
    torch.manual_seed(0)
    model, x = MODELS["mlp"]()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": model[2].parameters(), "lr": 2e-3, "weight_decay": 0.1},
    ]
    example = (x, torch.randint(0, 4, (16,)))
    check(build(Task(model, loss, torch.optim.AdamW(groups), example, "loss", "accuracy")).plan)
