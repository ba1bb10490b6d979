"""Small models whose channels are tied together in all the ways that networks do it."""

import torch
from torch import nn
from torch.nn import functional


class Lambda(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *inputs, **named):
        return self.function(self, *inputs, **named)


def conv(c, n, k=3, **more):
    return nn.Conv2d(c, n, k, padding=k // 2, **more)


def images(*shape):
    return torch.randn(2, *shape) if shape else torch.randn(2, 3, 8, 8)


def residual():
    def forward(m, x):
        x = functional.relu(m.bn1(m.a(x)))
        x = x + m.bn2(m.c(functional.relu(m.b(x))))
        return m.head(x.mean((2, 3)))

    return Lambda(
        forward, a=conv(3, 16), b=conv(16, 24), c=conv(24, 16), head=nn.Linear(16, 5),
        bn1=nn.BatchNorm2d(16), bn2=nn.BatchNorm2d(16),
    )  # fmt: skip


def densenet():
    def forward(m, x):
        x = m.a(x)
        x = torch.cat([x, functional.relu(m.b(m.bn1(x)))], 1)
        x = torch.cat([x, functional.relu(m.c(m.bn2(x)))], 1)
        return m.head(functional.adaptive_avg_pool2d(m.bn3(x), 1).flatten(1))

    return Lambda(
        forward, a=conv(3, 16), b=conv(16, 8), c=conv(24, 8), head=nn.Linear(32, 5),
        bn1=nn.BatchNorm2d(16), bn2=nn.BatchNorm2d(24), bn3=nn.BatchNorm2d(32),
    )  # fmt: skip


def unet():
    def forward(m, x):
        a = functional.relu(m.a(x))
        b = functional.relu(m.b(functional.max_pool2d(a, 2)))
        up = functional.interpolate(m.c(b), scale_factor=2, mode="bilinear")
        learned = m.up(b)
        return m.head(torch.cat([a, up, learned], 1))

    return Lambda(
        forward, a=conv(3, 8), b=conv(8, 16), c=conv(16, 16), head=conv(32, 2),
        up=nn.ConvTranspose2d(16, 8, 2, 2),
    )  # fmt: skip


def c2f():
    def forward(m, x):
        parts = list(functional.silu(m.a(x)).chunk(2, 1))
        parts.append(parts[-1] + m.c(functional.silu(m.b(parts[-1]))))
        parts.append(m.d(parts[-1]))
        return m.head(m.e(torch.cat(parts, 1)))

    return Lambda(
        forward, a=conv(3, 32), b=conv(16, 16), c=conv(16, 16), d=conv(16, 16), e=conv(64, 16),
        head=conv(16, 4, 1),
    )  # fmt: skip


def squeeze_excite():
    def forward(m, x):
        x = functional.hardswish(m.bn(m.deep(m.a(x))))
        gate = functional.hardsigmoid(m.up(functional.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return m.head((x * gate).mean((2, 3)))

    return Lambda(
        forward, a=conv(3, 16), deep=conv(16, 16, groups=16), bn=nn.BatchNorm2d(16),
        down=conv(16, 8, 1), up=conv(8, 16, 1), head=nn.Linear(16, 5),
    )  # fmt: skip


def resnext():
    def forward(m, x):
        x = functional.relu(m.norm(m.a(x)))
        x = functional.relu(m.b(x))
        return m.head(m.wide(m.c(x)).amax((2, 3)))

    return Lambda(
        forward, a=conv(3, 32), norm=nn.GroupNorm(4, 32), b=conv(32, 64, groups=4),
        c=conv(64, 16, 1), wide=conv(16, 32, groups=16), head=nn.Linear(32, 5),
    )  # fmt: skip


def shared():
    def forward(m, x):
        for _ in range(2):
            x = functional.relu(m.a(x))
        return m.tied(m.b(x)) + m.head(m.b(x))

    model = Lambda(
        forward, a=nn.Linear(16, 16), b=nn.Linear(16, 24), head=nn.Linear(24, 5),
        tied=nn.Linear(24, 5),
    )  # fmt: skip
    model.tied.weight = model.head.weight
    return model


def flattened():
    def forward(m, x):
        x = functional.max_pool2d(functional.relu(m.a(x)), 2)
        x = m.b(x.flatten(1)).relu()
        return m.c(x) + m.d(m.e(x).unflatten(1, (8, 2, 1)).permute(0, 2, 3, 1).flatten(1))

    return Lambda(
        forward, a=conv(3, 8), b=nn.Linear(128, 16), c=nn.Linear(16, 5), d=nn.Linear(16, 5),
        e=nn.Linear(16, 16),
    )  # fmt: skip


def option_a():
    def forward(m, x):
        x = functional.relu(m.a(x))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = functional.relu(m.c(functional.relu(m.b(x))) + shortcut)
        return m.head(m.d(x).mean((2, 3)))

    return Lambda(
        forward, a=conv(3, 8), b=nn.Conv2d(8, 16, 3, 2, 1), c=conv(16, 16), d=conv(16, 16),
        head=nn.Linear(16, 5),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Lambda(
        lambda m, x: m.head(m.body(m.enter(x)).mean(1)),
        enter=nn.Linear(8, 16), body=nn.TransformerEncoder(layer, 2), head=nn.Linear(16, 5),
    )  # fmt: skip


def decoder():
    body = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    return Lambda(
        lambda m, x: m.head(m.body(m.enter(x), m.enter(x[:, :3])).amax(1)),
        enter=nn.Linear(8, 16), body=body, head=nn.Linear(16, 5),
    )  # fmt: skip


class Gated(nn.Module):
    """A language model of today: RMSNorm, grouped queries, rotated halves, a gated MLP."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.norm, self.last = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o = nn.Linear(32, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, 11)
        self.register_buffer("angles", torch.rand(4, 8))

    def forward(self, ids):
        x = self.table(ids)
        y = self.norm(x)
        q = self.rotated(self.q(y).unflatten(-1, (4, 8)).transpose(1, 2), len(ids[0]))
        k = self.rotated(self.k(y).unflatten(-1, (2, 8)).transpose(1, 2), len(ids[0]))
        v = self.v(y).unflatten(-1, (2, 8)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.scale * self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.head(self.last(x)).softmax(-1)

    def rotated(self, x, length):
        angles = self.angles[:length]
        one, other = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-other, one], -1) * angles.sin()


class Matrices(nn.Module):
    """Attention by hand, weights as plain matrices, GLU, a table of positions as a buffer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Parameter(torch.randn(8, 16) / 3)
        self.inner = nn.Parameter(torch.randn(16, 32) / 4)
        self.qkv = nn.Linear(16, 48)
        self.leave = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)
        self.register_buffer("positions", torch.randn(1, 6, 16))

    def forward(self, x):
        x = x @ self.enter + self.positions[:, : x.shape[1]]
        x = x + functional.glu(torch.matmul(x, self.inner))
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).split(16, 2))
        y = ((q @ k.transpose(2, 3)) / 3).softmax(-1) @ v
        x = functional.normalize(x + self.leave(y.transpose(1, 2).reshape(x.shape)), dim=-1)
        return self.head((x - x.mean(-1, keepdim=True)).max(1)[0])


def shuffled():
    def forward(m, x):
        x = functional.prelu(m.a(x), m.slope)
        x = functional.pixel_shuffle(m.b(x), 2)
        x = functional.channel_shuffle(m.c(x), 2)
        x = functional.instance_norm(m.d(x), weight=m.scale, bias=m.shift)
        return m.head(x)

    model = Lambda(
        forward, a=conv(3, 8), b=conv(8, 32), c=conv(8, 16), d=conv(16, 16, groups=2),
        head=conv(16, 3),
    )  # fmt: skip
    for name, size in (("slope", 8), ("scale", 16), ("shift", 16)):
        model.register_parameter(name, nn.Parameter(torch.rand(size)))
    return model


def class_token():
    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        x = x + m.b(functional.gelu(m.a(m.norm(x))))
        return m.head(x[:, 0])

    model = Lambda(
        forward, patches=nn.Conv2d(3, 16, 4, 4), norm=nn.LayerNorm(16), a=nn.Linear(16, 24),
        b=nn.Linear(24, 16), head=nn.Linear(16, 4),
    )  # fmt: skip
    model.token = nn.Parameter(torch.randn(1, 1, 16))
    model.positions = nn.Parameter(torch.randn(1, 5, 16))
    return model


def einsums():
    def forward(m, x):
        q, k, v = (part.unflatten(2, (2, 8)) for part in m.qkv(m.a(x)).split(16, 2))
        weights = torch.einsum("b q h d, b k h d -> b h q k", q, k).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return m.head(m.leave(y) * torch.einsum("bnd,bnd->bn", y, y)[..., None])

    return Lambda(
        forward, a=nn.Linear(8, 16), qkv=nn.Linear(16, 48), leave=nn.Linear(16, 12),
        head=nn.Linear(12, 4),
    )  # fmt: skip


def tokens():
    return torch.randint(11, (2, 4))


MODELS = {
    "residual": (residual, images),
    "densenet": (densenet, images),
    "unet": (unet, images),
    "c2f": (c2f, images),
    "squeeze_excite": (squeeze_excite, images),
    "resnext": (resnext, images),
    "shared": (shared, lambda: torch.randn(2, 16)),
    "flattened": (flattened, images),
    "option_a": (option_a, images),
    "encoder": (encoder, lambda: torch.randn(2, 6, 8)),
    "decoder": (decoder, lambda: torch.randn(2, 6, 8)),
    "gated": (Gated, tokens),
    "matrices": (Matrices, lambda: torch.randn(2, 6, 8)),
    "shuffled": (shuffled, images),
    "class_token": (class_token, images),
    "einsums": (einsums, lambda: torch.randn(2, 6, 8)),
}
