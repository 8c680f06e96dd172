"""The paper's numbers, its names of the methods, and one colour for each of them."""

import numpy as np

NAMES = {  # of the weightings in experiments.py and in results.py
    "exp": "Exp",
    "linear": "Linear",
    "square": "Square",
    "linear_neg": "Lin. Neg.",
    "square_neg": "Sqr. Neg.",
    "ours": "Linear",  # programs of peers/peers.py
    "ours-n8": "Linear, N = 8",
    "dpmd": "DPMD, authors'",
    "cleanrl-td3": "TD3, CleanRL",
    "sbx-sac": "SAC, SBX",
}
COLOURS = {
    "Exp": "tab:green",
    "Linear": "tab:blue",
    "Square": "tab:purple",
    "Lin. Neg.": "tab:red",
    "Sqr. Neg.": "tab:orange",
    "Linear, N = 8": "tab:cyan",
    "DPMD, authors'": "0.25",
    "TD3, CleanRL": "0.5",
    "SAC, SBX": "0.7",
}
OTHERS = ("tab:brown", "tab:olive", "tab:pink", "black")  # of what has no name here
TASKS = ("HalfCheetah-v4", "Humanoid-v4", "Ant-v4", "Walker2d-v4", "Hopper-v4", "Swimmer-v4")
TABLE2 = {  # return after 1M steps on TASKS: mean and standard deviation over 5 seeds
    "TD3": "9820 1543 5263 47 4400 1196 3732 388 3387 302 88 25",
    "SAC": "10257 1057 5298 69 2858 2637 4625 557 2126 1205 85 29",
    "QSM": "12573 1197 2308 468 711 42 3933 185 1594 256 108 37",
    "DIPO": "10136 2525 5184 132 977 20 3809 1112 1191 770 46 3",
    "DACER": "13298 790 3142 2557 4887 646 1871 3131 1813 1781 116 12",
    "QVPO": "8081 701 1375 886 2122 2011 2866 490 960 414 83 36",
    "Exp": "13627 704 5100 238 5071 533 4616 145 3002 296 69 16",
    "Square": "13276 1095 5068 435 5925 345 4478 1520 2809 954 52 1",
    "Linear": "13636 521 5376 154 5984 179 4909 186 2637 370 68 14",
    "Lin. Neg.": "13907 1902 5466 377 5700 230 4906 438 2609 733 66 13",
}
TABLE2 = {name: np.array(row.split(), float).reshape(6, 2) for name, row in TABLE2.items()}
BEST = dict(zip(TASKS, np.max([row[:, 0] for row in TABLE2.values()], axis=0), strict=True))
SIMBAV2 = {  # the results that SimbaV2 publishes: mean over 10 seeds, 1M steps; no Swimmer
    "SAC, SimbaV2's page": (11321, 4826, 5734, 4536, 2787, None),
    "CrossQ, SimbaV2's page": (12893, 10480, 6980, 6257, 2467, None),
    "SimbaV2": (12022, 10546, 7429, 6938, 4054, None),
}
