"""Small environments for the tests, each of one kind of trouble: `tiny_envs:Point-v0` and so on."""

import os
import signal

import gymnasium as gym
import numpy as np

Box = gym.spaces.Box


class Point(gym.Env):
    """obs [position, clock, 1]; the action moves the position, reward bias - position^2; cut off by
    a TimeLimit. The kinds below change its attributes or its methods."""

    low, high, shape, act_dtype, bias = -1.0, 3.0, (1,), np.float32, 0.0
    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    metadata = {"render_modes": ["rgb_array"]}
    opened = closed = 0  # over all kinds, as is `left`: the steps until `signal` comes
    seeds = []  # of all resets that have one
    left, signal = int(os.environ.get("KILL_AFTER", 0)), signal.SIGKILL

    def __init__(self, render_mode=None):
        Point.opened += 1
        self.render_mode = render_mode
        self.action_space = Box(self.low, self.high, self.shape, self.act_dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Point.seeds += [] if seed is None else [seed]
        self.position, self.clock = self.np_random.normal(), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        Point.left -= 1
        if Point.left == 0:
            os.kill(os.getpid(), Point.signal)
        self.clock += 1
        self.position += 0.1 * float(action[0]) + 0.01 * self.np_random.normal()
        return self.observe(), self.reward(), self.ends(), False, {}

    def observe(self):
        return np.array([self.position, self.clock / 100, 1.0])

    def reward(self):
        return self.bias - self.position**2

    def ends(self):
        return False

    def render(self):
        return np.full((32, 48, 3), self.clock, np.uint8)

    def close(self):
        Point.closed += 1


# ---- arrays, numbers and flags as environments return them -------------------------------------


class OneBuffer(Point):
    """All observations of all episodes are one array."""

    def observe(self):
        self.buffer = getattr(self, "buffer", np.zeros(3, np.float32))
        self.buffer[:] = super().observe()
        return self.buffer


class Lists(Point):
    """An observation as a list, a reward of shape (1,), integers as flags, anything in info."""

    def observe(self):
        return super().observe().tolist()

    def reward(self):
        return np.array([super().reward()])

    def step(self, action):
        obs, reward, _, _, _ = super().step(action)
        info = {"final_obs": self.clock, "episode": None, "contacts": np.zeros(self.clock % 3)}
        return obs, reward, 0, int(self.clock == 9), info | {str(self.clock): "text"}


class Nan(Point):
    """Not finite in float32 at one place: kind = reset, observation or reward; later than it."""

    kind, value, after = "observation", np.nan, 7

    def observe(self):
        obs = super().observe()
        at = 0 if self.kind == "reset" else self.after
        obs[1] = self.value if self.kind != "reward" and self.clock == at else obs[1]
        return obs

    def reward(self):
        return self.value if (self.kind, self.clock) == ("reward", self.after) else 0.0


class GlobalRandom(Point):
    """Draws its starts from numpy's global generator."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.random.normal()
        return self.observe(), {}


# ---- films -------------------------------------------------------------------------------------


class NoRenderMode(Point):
    def __init__(self):
        super().__init__()


class LosesDriver(Point):
    """Renders so many frames, and then no more."""

    frames = 60

    def render(self):
        type(self).frames -= 1
        if self.frames < 0:
            raise RuntimeError("the driver is gone")
        return super().render()


ATTRIBUTES = {
    "Huge": {"bias": 1e20},  # no critic can fit it
    "Narrow": {"high": 0.1},  # 0.100000001 in float32: rounding leads out of the space
    "Wide": {"high": 0.1, "act_dtype": np.float64},
    "Unbounded": {"low": -np.inf, "high": np.inf},
    "HalfBounded": {"low": -np.inf},
    "Whole": {"act_dtype": np.int64},
    "NoAction": {"shape": (0,)},
    "Image": {"observation_space": Box(-1, 1, (2, 2))},
    "TwoRewards": {"reward": lambda self: np.zeros(2)},
    "WrongObs": {"observe": lambda self: np.zeros(2)},
    "Both": {"ends": lambda self: self.clock == 6},  # terminated and truncated in one step
    "Goal": {"observation_space": gym.spaces.Dict(goal=Box(-1, 1, (3,)))},
}
globals().update({name: type(name, (Point,), x) for name, x in ATTRIBUTES.items()})
NoDriver = type("NoDriver", (LosesDriver,), {"frames": 0})
KINDS = [x for x in list(globals().values()) if isinstance(x, type) and issubclass(x, Point)]
for kind in KINDS:
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=50)
gym.register("Short-v0", Point, max_episode_steps=7)
gym.register("Endless-v0", Point)
