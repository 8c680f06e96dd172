"""Small environments for the tests, each unusual in one way: `tiny_envs:Point-v0`."""

import os
import signal

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

Box = gym.spaces.Box


class Point(gym.Env):
    """obs [position, clock, 1]; the action moves the position.

    The reward is -position^2 and a TimeLimit ends the episode. The kinds below change
    its attributes or its methods."""

    low = -1.0
    high = 3.0
    shape = (1,)
    act_dtype = np.float32
    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    metadata = {"render_modes": ["rgb_array"]}
    seeds = []  # of all resets that have one, over all kinds, as are the next two
    left = int(os.environ.get("KILL_AFTER", 0))  # steps until `signal` comes
    signal = signal.SIGKILL

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.action_space = Box(self.low, self.high, self.shape, self.act_dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            Point.seeds.append(seed)
        self.position = self.np_random.normal()
        self.clock = 0
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
        return -(self.position**2)

    def ends(self):
        return False

    def render(self):
        return np.full((32, 48, 3), self.clock, np.uint8)


# ---- observations, rewards and flags as environments return them ---------------------


class OneBuffer(Point):
    """All observations of all episodes are one array."""

    buffer = None

    def observe(self):
        if self.buffer is None:
            self.buffer = np.zeros(3, np.float32)
        self.buffer[:] = super().observe()
        return self.buffer


class Lists(Point):
    """An observation as a list, a reward of shape (1,), integer flags, any info."""

    def observe(self):
        return super().observe().tolist()

    def reward(self):
        return np.array([super().reward()])

    def step(self, action):
        obs, reward, _, _, _ = super().step(action)
        info = {
            "final_obs": self.clock,
            "episode": None,
            "contacts": np.zeros(self.clock % 3),
            str(self.clock): "text",
        }
        return obs, reward, 0, int(self.clock == 9), info


class Whole(Point):
    """Integers of the type `space`: hundredths of the position, and the clock."""

    space = np.int64

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 255, (3,), self.space)

    def observe(self):
        position = np.clip(128 + 50 * self.position, 0, 255)
        return np.array([position, self.clock, 1], self.space)


class Bytes(Whole):
    space = np.uint8


class Halves(Point):
    """The space says float16, the values lie beyond its range."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float16)

    def observe(self):
        return np.array([1e5 * self.position, self.clock, 1], np.float32)


class Both(Point):
    """Terminated and truncated in one step."""

    def ends(self):
        return self.clock == 6


# ---- rewards -------------------------------------------------------------------------


class Late(Point):
    """A reward at the last of 50 steps only."""

    def reward(self):
        return float(self.clock == 50)


class Faint(Point):
    def reward(self):
        return 1e-9 * super().reward()


class Huge(Point):
    """No critic can fit it."""

    def reward(self):
        return 1e20 - self.position**2


class Nan(Point):
    """Not finite in float32 at step `after` of an episode."""

    kind = "observation"  # or reward
    value = np.nan
    after = 7

    def observe(self):
        obs = super().observe()
        if self.kind == "observation" and self.clock == self.after:
            obs[1] = self.value
        return obs

    def reward(self):
        if self.kind == "reward" and self.clock == self.after:
            return self.value
        return 0.0


class Beyond(Nan):
    """Finite in float64."""

    value = 1e39


# ---- what makes environments, their seeds and actions --------------------------------


class CSeed(Point):
    """Hands its seed to a C library, as a signed integer of 32 bits."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and not -(2**31) <= seed < 2**31:
            raise OverflowError("Python int too large to convert to C int")
        return super().reset(seed=seed)


class MissingFile(Point):
    def __init__(self, render_mode=None):
        open("/nonexistent/model.xml")


class TwoLines(Point):
    def __init__(self, render_mode=None):
        raise KeyError("the first line\nand another one")


class NoRenderMode(Point):
    def __init__(self):
        super().__init__()


class Narrow(Point):
    high = 0.1  # 0.100000001 in float32: rounding leads out of the space


class Unbounded(Point):
    low = -np.inf
    high = np.inf


class HalfBounded(Point):
    low = -np.inf


class WholeActions(Point):
    act_dtype = np.int64


class Image(Point):
    observation_space = Box(-1, 1, (2, 2))


class Goal(Point):
    observation_space = gym.spaces.Dict(goal=Box(-1, 1, (3,)))


BALL = """
<mujoco>
  <worldbody>
    <body>
      <joint name="x" type="slide" axis="1 0 0"/>
      <geom type="sphere" size=".1"/>
    </body>
  </worldbody>
  <actuator><motor joint="x" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


class Plain(Point):
    """Its constructor takes nothing."""

    def __init__(self):
        super().__init__()


class Grid(Point):
    """Actions are matrices."""

    shape = (2, 2)


class Rebuild(MujocoEnv):
    """Compiles its model again at every reset; the reward of each step is 1.

    `path`, where a test must write BALL, is the file of the model."""

    path = os.environ.get("BALL_XML", "")
    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 100,
    }

    def __init__(self, **kwargs):
        space = Box(-np.inf, np.inf, (2,), np.float64)
        super().__init__(self.path, 5, space, default_camera_config={}, **kwargs)

    def observe(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset_model(self):
        self.model, self.data = self._initialize_simulation()
        self.set_state(self.np_random.uniform(-1, 1, 1), np.zeros(1))
        return self.observe()

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        return self.observe(), 1.0, False, False, {}


KINDS = [x for x in list(globals().values()) if isinstance(x, type)]
for kind in KINDS:
    if issubclass(kind, gym.Env) and kind is not MujocoEnv:
        gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=50)
gym.register("Short-v0", Point, max_episode_steps=7)
gym.register("Endless-v0", Point)
