"""The reward oracle of DRAKES: gReLU's EnformerPretrainedModel in evaluation.

Legend: B sequences, L bases, C channels, n positions of the transformer.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dna.layers import conv, dense, layer_norm


def pad(x, before, after):
    """Zeros before and after the positions of x [B, L, C]."""
    none = (0, 0)
    return jnp.pad(x, (none, (before, after), none))


def short_conv(layer, x):
    """`conv` for L < K as one product: XLA for CPUs takes 300 times as long for it."""
    length = x.shape[1]
    width = layer["w"].shape[0]
    x = pad(x, width // 2, width // 2)
    windows = []
    for i in range(width):
        windows.append(x[:, i : i + length])
    windows = jnp.concatenate(windows, axis=-1)
    w = layer["w"].reshape(windows.shape[-1], -1)
    return dense({"w": w, "b": layer["b"]}, windows)


def gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def norm_gelu_conv(block, x):
    """Batch norm, whose running statistics are part of w and b; gelu; convolution."""
    norm = block["norm"]
    layer = block["conv"]
    scale = norm["w"][None, None]
    shift = norm["b"][None, None]
    x = gelu(x * scale + shift)
    if x.shape[1] < layer["w"].shape[0]:
        return short_conv(layer, x)
    return conv(layer, x)


def attention_pool(w, x):
    """Softmax-weighted mean of pairs of positions: [B, L, C] -> [B, ceil(L / 2), C].

    Each channel has its own weights. The last position of an odd length has no partner
    and stays as it is.
    """
    b, length, c = x.shape
    odd = length % 2
    x = pad(x, 0, odd)
    exists = jnp.arange(length + odd) < length
    exists = exists.reshape(1, -1, 2, 1)
    x = x.reshape(b, -1, 2, c)
    logits = x @ w
    logits = jnp.where(exists, logits, -jnp.inf)
    share = jax.nn.softmax(logits, axis=2)
    return jnp.sum(x * share, axis=2)


def position_features(n, size):
    """Features of the distances -(n - 1) .. n - 1, a numpy constant [2 n - 1, size].

    A third each of exponentials, central masks and gamma densities, then all of these
    with the sign of the distance.
    """
    k = size // 6
    distance = np.arange(-n + 1, n)[:, None]
    d = np.abs(distance)
    log_half_life = np.linspace(3, math.log2(n), k)
    exponential = 0.5 ** (d / 2**log_half_life)
    width = 2.0 ** np.arange(1, k + 1) - 1
    mask = d < width

    mean = np.linspace(n / k, n, k)
    std = n / (2 * k)
    shape = (mean / std) ** 2  # at least 4: the density is 0 at 0
    rate = mean / std**2
    log_gamma = np.array([math.lgamma(s) for s in shape])
    log_norm = log_gamma - shape * np.log(rate)
    log_d = np.log(np.maximum(d, 1e-300))
    log_density = (shape - 1) * log_d - rate * d - log_norm
    density = np.exp(log_density) + 1e-8
    gamma = density / density.max(axis=-1, keepdims=True)

    features = np.concatenate([exponential, mask, gamma], axis=-1)
    signed = np.sign(distance) * features
    features = np.concatenate([features, signed], axis=-1)
    return features.astype(np.float32)


def attention(block, x):
    """Self-attention with the relative positions of Transformer-XL: x [B, n, C]."""
    b, n, _ = x.shape
    content_bias = block["content_bias"]
    position_bias = block["position_bias"]
    heads, size = content_bias.shape

    def split(y):
        return y.reshape(b, n, heads, -1)

    q = split(x @ block["query"]) / math.sqrt(size)
    k = split(x @ block["key"])
    v = split(x @ block["value"])
    rel = block["rel"]
    features = position_features(n, len(rel))
    rel = jnp.asarray(features) @ rel
    rel = rel.reshape(-1, heads, size)  # [2 n - 1, heads, size]

    for_content = q + content_bias[None, None]
    for_position = q + position_bias[None, None]
    content = jnp.einsum("bihd,bjhd->bhij", for_content, k)
    position = jnp.einsum("bihd,mhd->bhim", for_position, rel)
    i = jnp.arange(n)
    j_minus_i = i[None] - i[:, None]
    index = j_minus_i + n - 1  # of this distance among the features
    index = index[None, None]
    position = jnp.take_along_axis(position, index, axis=-1)

    weight = jax.nn.softmax(content + position, axis=-1)
    mixed = jnp.einsum("bhij,bjhd->bihd", weight, v)
    mixed = mixed.reshape(b, n, -1)
    return dense(block["out"], mixed)


def enformer(params, x):
    """Tokens [B, L] or one-hot [B, L, 4] -> [B, 3]: hepg2, k562, sknsh.

    No activation after the head: it was trained by regression.
    """
    if x.ndim == 2:
        x = jax.nn.one_hot(x, 4)
    x = conv(params["stem"], x)
    for stage in params["tower"]:
        if "wide" in stage:
            x = norm_gelu_conv(stage["wide"], x)
        x = x + norm_gelu_conv(stage["point"], x)
        x = attention_pool(stage["pool"], x)
    for block in params["transformer"]:
        h = layer_norm(block["norm"], x)
        x = x + attention(block, h)
        h = layer_norm(block["mlp_norm"], x)
        h = jax.nn.relu(dense(block["up"], h))
        x = x + dense(block["down"], h)
    x = norm_gelu_conv(params["pointwise"], x)
    x = dense(params["head"], gelu(x))
    return jnp.mean(x, axis=1)
