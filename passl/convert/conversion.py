"""From the tensors of a file to the state of passl's own Layers: what belongs where, and a report of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from paddle import nn

from passl.convert.architecture import Architecture, given, infer, infer_head
from passl.convert.layout import Slot, blueprint, counters, prefixed, slots
from passl.convert.renames import official
from passl.convert.report import ConversionError, Report
from passl.convert.source import Entry, Source
from passl.models.dino import DINOHead
from passl.models.probe import LinearClassifier

KINDS = {
    "run": "student, teacher and centre of a whole DINO run",
    "network": "one network of a run: backbone and projection head",
    "backbone": "a backbone alone",
    "probe": "a backbone with a linear classifier",
    "linear": "a linear classifier alone",
}
_LINEAR_PARTS = ("probe", "concatenated", "classifier")
_HEADS = ("head", "dino_head", "ibot_head")


@dataclass
class Options:
    """What a user may say of a file; None where the file itself is asked.

    kind: one of KINDS. arch: a registered backbone; arguments: of it, and of the linear probe. layer: the backbone
    itself, in place of an architecture. checkpoint_key: "teacher" or "student", for that network's backbone alone.
    allow: patterns of keys that may be left over.
    """

    kind: Optional[str] = None
    arch: Optional[str] = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layer: Optional[nn.Layer] = None
    checkpoint_key: Optional[str] = None
    allow: Sequence[str] = ()


@dataclass
class Conversion:
    """State of passl's Layers, ready to be written or loaded.

    model: the section ``Model`` of a configuration that has these weights (of a backbone alone: its own section).
    state: names and shapes of passl -> arrays, views of the file where that can be. layout: the same names, and how
    PyTorch has them. counters: PyTorch's step counters of batch norms, which passl has none of.
    """

    kind: str
    model: dict[str, Any]
    architecture: Optional[Architecture]
    state: dict[str, np.ndarray]
    layout: list[Slot]
    counters: dict[str, int]
    report: Report


def convert_source(source: Source, options: Options, backbone: Optional[Source] = None) -> Conversion:
    """Find out what ``source`` is, and convert it. ``backbone``: the file of the backbone of a linear classifier.

    Raises:
        ConversionError: nothing matches, something is left over or missing, or the options contradict the file.
    """
    if options.kind is not None and options.kind not in KINDS:
        raise ConversionError(f"kind ({options.kind!r}) must be one of {', '.join(KINDS)}")
    kind = _kind(source, options)
    assembly = _Assembly(source, options)
    model = getattr(assembly, f"add_{kind}")()
    if backbone is not None:
        if kind != "linear":
            raise ConversionError(f"{source.path} holds {KINDS[kind]}: --backbone is for a linear classifier alone")
        assembly.read_from(backbone)
        kind, model = "probe", assembly.add_backbone_below(model)
    conversion = assembly.finish(kind, model)
    conversion.report.allow(options.allow)
    return conversion


def _kind(source: Source, options: Options) -> str:
    networks = source.networks()
    if options.checkpoint_key and options.kind not in (None, "backbone", "network"):
        raise ConversionError(f"--checkpoint-key is for a backbone or network, not for a {options.kind}")
    if options.checkpoint_key and networks and options.checkpoint_key not in networks:
        raise ConversionError(f"{source.path} has no {options.checkpoint_key}, only the {networks[0]}")
    if options.kind:
        return options.kind
    if options.checkpoint_key:
        return "backbone"
    if len(networks) > 1:
        return "run"
    parts = source.parts(networks[0] if networks else "")
    if any("last_layer.weight_v" in parts.get(part, {}) for part in _HEADS):
        return "network"
    if "backbone" not in parts:
        return "linear"
    return "probe" if any(part in parts for part in _LINEAR_PARTS) else "backbone"


class _Assembly:
    """Takes parts of a source, and keeps account of every tensor."""

    def __init__(self, source: Source, options: Options) -> None:
        self.options = options
        self.arguments = dict(options.arguments)
        self.report = Report()
        self.architecture: Optional[Architecture] = None
        self.state: dict[str, np.ndarray] = {}
        self.layout: list[Slot] = []
        self.counters: dict[str, int] = {}
        self.read_from(source)

    def read_from(self, source: Source) -> None:
        """Go on with another file."""
        self.source = source
        self.taken: set[str] = set()

    # --- kinds ---

    def add_run(self) -> dict[str, Any]:
        """A DINO run: both networks and the centre."""
        for network in ("student", "teacher"):
            if network not in self.source.networks():
                raise ConversionError(f"{self.source.path} has no {network}: it is no whole run")
        sections = [self._add_network(network, f"{network}.") for network in ("student", "teacher")]
        center = self.source.parts("").get("center", {})
        if sections[0] != sections[1]:
            raise ConversionError(f"student and teacher are not alike: {sections[0]} and {sections[1]}")
        out_dim = sections[0]["head"]["out_dim"] if "head" in sections[0] else 0
        slot = Slot("dino_loss.center", "dino_loss.center", (1, out_dim), "same")
        self._fill("", [slot], {"dino_loss.center": entry for entry in center.values()})
        return {"name": "DINO", **sections[0]}

    def add_network(self) -> dict[str, Any]:
        """Backbone and heads of one network."""
        network = self._network()
        return self._add_network(network, f"{network}." if network else "")

    def add_backbone(self) -> dict[str, Any]:
        """The backbone of the network that is asked for, nothing else."""
        network = self._network()
        self.architecture = self._add_backbone(network, "")
        if self.options.kind or self.options.checkpoint_key:
            self._leave_rest(network)
        return self.architecture.section

    def add_linear(self) -> dict[str, Any]:
        """A linear classifier alone."""
        return self._add_linear(None)

    def add_probe(self) -> dict[str, Any]:
        """A backbone with a linear classifier."""
        self.architecture = self._add_backbone("", "backbone.")
        return self._probe_section(self._add_linear(self.architecture))

    def add_backbone_below(self, linear: dict[str, Any]) -> dict[str, Any]:
        """The backbone that a linear classifier was trained on, from a second file."""
        network = self._network()
        self.architecture = self._add_backbone(network, "backbone.")
        self._leave_rest(network)
        return self._probe_section({**linear, **self._probe_input(self.architecture, linear["in_dim"])})

    def finish(self, kind: str, model: dict[str, Any]) -> Conversion:
        """Everything together; what no part has taken is left over."""
        gone = {*self.taken, *self.report.not_asked}
        self.report.left_over += [entry.key for entry in self.source.entries if entry.key not in gone]
        return Conversion(kind, model, self.architecture, self.state, self.layout, self.counters, self.report)

    # --- parts ---

    def _leave_rest(self, network: str) -> None:
        """Only the backbone is wanted: everything else is not asked for, rather than left over."""
        self.report.not_asked += [e.key for e in self.source.entries if (e.network, e.part) != (network, "backbone")]

    def _network(self) -> str:
        """Whose backbone is meant: as asked for, else the teacher's, which is the better one."""
        networks = self.source.networks()
        wanted = self.options.checkpoint_key or "teacher"
        return wanted if wanted in networks else networks[0] if networks else ""

    def _add_network(self, network: str, prefix: str) -> dict[str, Any]:
        architecture = self._add_backbone(network, f"{prefix}backbone.")
        self.architecture = architecture
        section: dict[str, Any] = {"backbone": architecture.section}
        parts = self.source.parts(network)
        for part in _HEADS:
            if part in parts:
                arguments = self._add_head(parts[part], f"{prefix}{part}.")
                section[part] = {"name": "DINOHead", **{k: v for k, v in arguments.items() if k != "in_dim"}}
        return section

    def _add_backbone(self, network: str, prefix: str) -> Architecture:
        entries = self.source.parts(network).get("backbone", {})
        names = official({name: entry.value for name, entry in entries.items()})
        shapes = {name: self._torch_shape(name, value) for name, value in names.values.items()}
        architecture = self._architecture(shapes)
        renamed = {name: entries[names.before[name]]._replace(value=value) for name, value in names.values.items()}
        self._fill(prefix, slots(self.options.layer or architecture.blueprint()), renamed)
        return architecture

    def _architecture(self, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        known = {key: value for key, value in self.arguments.items() if key not in ("n_last_blocks", "avgpool")}
        if self.options.layer is not None:
            return Architecture(type(self.options.layer).__name__)
        return given(self.options.arch, shapes, known) if self.options.arch else infer(shapes, known)

    def _add_head(self, entries: dict[str, Entry], prefix: str) -> dict[str, Any]:
        named = official({name: entry.value for name, entry in entries.items()})
        shapes = {name: self._torch_shape(name, value) for name, value in named.values.items()}
        arguments = infer_head(shapes)
        layout = slots(blueprint(DINOHead, arguments))
        self._fill(prefix, layout, {name: entries[named.before[name]] for name in named.values})
        return arguments

    def _add_linear(self, architecture: Optional[Architecture]) -> dict[str, Any]:
        parts = self.source.parts("")
        part = next((name for name in _LINEAR_PARTS if name in parts), None)
        if part is None or "weight" not in parts[part]:
            raise ConversionError(f"{self.source.path} holds no linear classifier (linear.weight, linear.bias)")
        entries = parts[part]
        num_classes, in_dim = self._torch_shape("weight", entries["weight"].value)
        section = {"in_dim": in_dim, "num_classes": num_classes, **self._probe_input(architecture, in_dim, part)}
        if part == "concatenated":
            weight = entries["weight"]
            entries = {**entries, "weight": weight._replace(value=_interleaved(weight.value, section))}
        layout = prefixed("linear.", slots(blueprint(LinearClassifier, {"in_dim": in_dim, "num_classes": num_classes})))
        self._fill("", layout, {f"linear.linear.{name}": entry for name, entry in entries.items()})
        return section

    def _probe_input(self, architecture: Optional[Architecture], in_dim: int, part: str = "probe") -> dict[str, Any]:
        """Which features a linear classifier of ``in_dim`` inputs sees."""
        asked = {key: self.arguments[key] for key in ("n_last_blocks", "avgpool") if key in self.arguments}
        if part == "classifier":
            return {"n_last_blocks": 1, "avgpool": False, **asked}
        if part == "concatenated":  # DINOv2: [CLS] of the last 1 or 4 blocks, and the mean of the patches
            width = architecture.blueprint().embed_dim if architecture else None
            blocks = in_dim // width - 1 if width else 4 if in_dim % 5 == 0 else 1
            return {"n_last_blocks": blocks, "avgpool": True, **asked}
        if architecture is None:
            return asked
        # Published: four blocks of ViT-S; one and the mean of the patches of ViT-B.
        layer = architecture.blueprint()
        times = in_dim // layer.embed_dim
        if not hasattr(layer, "get_intermediate_layers"):
            return {"n_last_blocks": 1, "avgpool": False, **asked}
        return {"n_last_blocks": 1 if times == 2 else times, "avgpool": times == 2, **asked}

    def _probe_section(self, linear: dict[str, Any]) -> dict[str, Any]:
        architecture = self.architecture
        assert architecture is not None
        layer = architecture.blueprint()
        times = linear["n_last_blocks"] + linear["avgpool"] if hasattr(layer, "get_intermediate_layers") else 1
        if layer.embed_dim * times != linear["in_dim"]:
            raise ConversionError(
                f"the linear classifier has {linear['in_dim']} inputs, and {architecture.name} with n_last_blocks="
                f"{linear['n_last_blocks']} and avgpool={linear['avgpool']} gives {layer.embed_dim * times}: set them "
                "with --set n_last_blocks=N --set avgpool=true, or give the backbone that it was trained on"
            )
        rest = {key: linear[key] for key in ("num_classes", "n_last_blocks", "avgpool")}
        return {"name": "LinearProbe", "backbone": architecture.section, **rest}

    # --- tensors ---

    def _torch_shape(self, name: str, value: np.ndarray) -> tuple[int, ...]:
        if self.source.layout == "torch":
            return tuple(value.shape)
        if name.endswith("weight_g"):
            return (*value.shape, 1)
        is_linear = value.ndim == 2 and name.rpartition(".")[2] in ("weight", "weight_v")
        return tuple(value.shape[::-1] if is_linear else value.shape)

    def _fill(self, prefix: str, layout: list[Slot], entries: Mapping[str, Entry]) -> None:
        """Put ``entries`` (official names) into the slots of a Layer whose names start with ``prefix``."""
        report = self.report
        known_counters = counters(layout)
        for name in known_counters:
            if name in entries:
                self.counters[prefix + name] = int(entries[name].value)
                report.counters.append(entries[name].key)
                self.taken.add(entries[name].key)
        for slot in layout:
            entry = entries.get(slot.torch_name)
            if entry is None:
                report.missing.append(prefix + slot.torch_name)
                continue
            self.taken.add(entry.key)
            shape = self._torch_shape(slot.torch_name, entry.value)
            if shape != slot.torch_shape:
                report.misshapen.append(f"{entry.key} (file {list(shape)}, architecture {list(slot.torch_shape)})")
                continue
            report.matched.append(entry.key)
            if entry.key != prefix + slot.name:
                report.renamed.append((entry.key, prefix + slot.name))
            is_torch = self.source.layout == "torch"
            if is_torch and slot.layout == "transposed":
                report.transposed.append(entry.key)
            self.state[prefix + slot.name] = slot.from_torch(entry.value) if is_torch else entry.value
        self.layout += prefixed(prefix, layout)


def _interleaved(weight: np.ndarray, section: Mapping[str, Any]) -> np.ndarray:
    """DINOv2's columns [cls_1 .. cls_n, mean] in the order of passl's probe, whose last pair is interleaved."""
    blocks = section["n_last_blocks"]
    width = weight.shape[1] // (blocks + 1)
    columns = np.arange(weight.shape[1]).reshape(blocks + 1, width)
    return weight[:, np.concatenate([columns[:-2].ravel(), columns[-2:].T.ravel()])]
