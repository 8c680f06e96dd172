"""Small environments for the tests; `tiny_envs:Point-v0` and the like register them."""

import gymnasium as gym
import numpy as np


class Point(gym.Env):
    """obs [position, clock, 1]; the action moves the position, reward -position^2, never ends.

    `terminate_at`, `nan_reward_at` and `nan_obs_at` are steps of an episode, or None.
    """

    def __init__(self, low=-1.0, high=3.0, terminate_at=None, nan_reward_at=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(np.float32([low]), np.float32([high]))
        self.terminate_at, self.nan_reward_at, self.nan_obs_at = terminate_at, nan_reward_at, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.clock = self.np_random.normal(), 0
        return self.observe(), {}

    def step(self, action):
        self.clock += 1
        self.position += 0.1 * float(action[0]) + 0.01 * self.np_random.normal()
        reward = np.nan if self.clock == self.nan_reward_at else -(self.position**2)
        return self.observe(), reward, self.clock == self.terminate_at, False, {}

    def observe(self):
        position = np.nan if self.clock and self.clock == self.nan_obs_at else self.position
        return np.array([position, self.clock / 100, 1.0])


class Unbounded(Point):
    def __init__(self):
        super().__init__(low=-np.inf, high=np.inf)


class Whole(Point):
    """Integer actions in a Box."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.int64)


class Image(Point):
    """An observation of two dimensions."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(-1, 1, (2, 2))

    def observe(self):
        return np.zeros((2, 2), np.float32)


HOPPER = "gymnasium.envs.mujoco.hopper_v4:HopperEnv"
register = gym.register
register("Point-v0", Point, max_episode_steps=50)
register("Nan-v0", Point, max_episode_steps=500, kwargs={"nan_reward_at": 77})
register("Both-v0", Point, max_episode_steps=6, kwargs={"terminate_at": 6})  # both flags at once
register("ShortHopper-v0", HOPPER, max_episode_steps=7)
register("Unbounded-v0", Unbounded)
register("Whole-v0", Whole)
register("Image-v0", Image)
