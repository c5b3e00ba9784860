"""From stored features to scores: the Gram matrix, its ridge and inverse, and scores a block of rows at a time."""

from .scores import ScoreMatrix
from .solver import Solver
from .top_scores import TopScores, save_table

__all__ = ["ScoreMatrix", "Solver", "TopScores", "save_table"]
