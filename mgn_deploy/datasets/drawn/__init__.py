"""People drawn by code: a re-identification data set that needs no download and shows nobody.

A drawn person is a deterministic function of (identity, camera, frame, seed): the same call gives the same
pixels in every process. All pictures of one person share the combination of their parts, as on a street.
"""

from mgn_deploy.datasets.drawn.crop import draw_crop
from mgn_deploy.datasets.drawn.market import DrawnDataset, draw_market1501, draw_people

__all__ = ["DrawnDataset", "draw_crop", "draw_market1501", "draw_people"]
