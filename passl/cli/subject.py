"""The options that say which network a command looks at, shared by those that take any backbone."""

from __future__ import annotations

import argparse

from passl.config import Config, ConfigError, load
from passl.yaml_io import parse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Weights; and the architecture, which is read off them where nothing is said."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add(
        "--pretrained_model", "--pretrained-model", "--pretrained_weights", metavar="X",
        help="weights: the prefix of a run or backbone, or a .pth or .safetensors file",
    )  # fmt: skip
    add("--checkpoint_key", "--checkpoint-key", choices=("teacher", "student"), default="teacher", help="of a run")
    add("--arch", metavar="NAME", help="a backbone: vit_small, resnet50 ... (default: what the weights show)")
    add("--patch_size", "--patch-size", type=int, metavar="N", help="of --arch")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another argument of --arch; repeatable")
    add("-c", "--config", metavar="FILE", help="a configuration, in place of --arch")
    add(
        "-o", "--override", action="append", default=[], metavar="A.B.0.C=VALUE",
        help="change one value of the configuration; repeatable",
    )  # fmt: skip
    add("--device", default="auto", help="cpu, gpu, gpu:0 (default: a GPU where there is one)")


def config_of(options: argparse.Namespace) -> Config:
    """The checked configuration that the options of :func:`add_options` mean.

    Raises:
        ConfigError: they contradict each other, or a value is not what it must be.
        CheckpointError: the architecture is to be read off weights, and cannot be.
    """
    from passl.engine import run, subject

    arguments = dict(_key_and_value(text) for text in options.set)
    if options.patch_size is not None:
        arguments["patch_size"] = options.patch_size
    if options.config is not None:
        if options.arch or arguments:
            raise ConfigError(["--arch, --patch_size and --set are in place of a configuration: use -o with -c"])
        config = load(options.config, options.override)
    elif options.arch is not None:
        config = Config({"Model": {"name": options.arch, **arguments}}, {(): "--arch"})
    elif options.pretrained_model is not None:
        model = subject.model_of(options.pretrained_model, options.checkpoint_key, arguments)
        config = Config({"Model": model}, {(): f"--pretrained_model {options.pretrained_model}"})
    else:
        raise ConfigError(["no network: give --pretrained_model X, or --arch NAME for an untrained one, or -c FILE"])
    if options.override and options.config is None:
        raise ConfigError(["-o changes a configuration (-c): use --set with --arch"])
    given = {"device": options.device, "checkpoint_key": options.checkpoint_key}
    if options.pretrained_model is not None:
        given["pretrained_model"] = options.pretrained_model
    config["Global"] = {**(config.get("Global") or {}), **given}
    return run.checked(config, training=False)


def _key_and_value(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError([f"--set {text}: expected KEY=VALUE, such as patch_size=8"])
    return key, parse(value, f"--set {key}")
