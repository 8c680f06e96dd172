"""Layers that the generator and the oracle of DRAKES share."""

import jax


def dense(layer, x):
    return x @ layer["w"] + layer["b"]


def conv(layer, x, dilation=1):
    """x [B, L, in] with w [K, in, out] -> [B, L, out]; zeros beyond both ends."""
    y = jax.lax.conv_general_dilated(
        x,
        layer["w"],
        window_strides=(1,),
        padding="SAME",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return y + layer["b"][None, None]


def layer_norm(norm, x):
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * norm["w"][None, None] + norm["b"][None, None]
