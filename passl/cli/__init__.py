"""The console commands. Paddle is imported only once there is something to run: ``--help`` answers at once."""

from passl.cli.convert import convert_main
from passl.cli.data import data_main
from passl.cli.doctor import doctor_main
from passl.cli.export import export_main
from passl.cli.plan import plan_main
from passl.cli.predict import predict_main
from passl.cli.train import eval_main, train_main
from passl.cli.visualize import visualize_main

__all__ = [
    "convert_main", "data_main", "doctor_main", "eval_main", "export_main", "plan_main", "predict_main", "train_main",
    "visualize_main",
]  # fmt: skip
