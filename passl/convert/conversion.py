"""From the tensors of a file to the state of passl's own Layers: what belongs where, and a report of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import numpy as np
from paddle import nn

from passl.convert.architecture import Architecture, given, infer, infer_head
from passl.convert.layout import Slot, blueprint, counters, prefixed, slots
from passl.convert.renames import official
from passl.convert.report import ConversionError, Report
from passl.convert.source import Entry, Source
from passl.formats.storage import BFLOAT16
from passl.models.channels import inflate_state
from passl.models.dino import DINOHead
from passl.models.positions import resize_positions
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
_PROBE_ARGUMENTS = ("n_last_blocks", "avgpool")


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
    PyTorch has them. counters: PyTorch's step counters of batch norms, which passl has none of. fitted: what was done
    to an RGB first convolution, and to positions, for Options.layer.
    """

    kind: str
    model: dict[str, Any]
    architecture: Optional[Architecture]
    state: dict[str, np.ndarray]
    layout: list[Slot]
    counters: dict[str, int]
    report: Report
    fitted: list[str] = field(default_factory=list)


def convert_source(source: Source, options: Options, backbone: Optional[Source] = None) -> Conversion:
    """Find out what ``source`` is, and convert it. ``backbone``: the file of the backbone of a linear classifier.

    Raises:
        ConversionError: it becomes nothing that is known, or the options contradict the file. What is left over or
            missing is in the report, whose ``check`` raises it.
    """
    if options.kind is not None and options.kind not in KINDS:
        raise ConversionError(f"--kind ({options.kind}) must be one of {', '.join(KINDS)}")
    copies = source.leave_out_copies(options.allow)
    kind = _kind(source, options)
    assembly = _Assembly(source, options)
    if backbone is None:
        model = getattr(assembly, f"add_{kind}")()
    elif kind == "linear":
        copies += backbone.leave_out_copies(options.allow)
        kind, model = "probe", assembly.add_linear_on(backbone)
    else:
        raise ConversionError(f"the file holds {KINDS[kind]}: --backbone is for a linear classifier alone")
    conversion = assembly.finish(kind, model)
    conversion.report.allowed += copies
    conversion.report.allow(options.allow)
    return conversion


def _kind(source: Source, options: Options) -> str:
    networks = source.networks()
    if options.checkpoint_key and options.kind not in (None, "backbone", "network"):
        raise ConversionError(f"--checkpoint-key is for a backbone or network, not for --kind {options.kind}")
    if options.checkpoint_key and networks and options.checkpoint_key not in networks:
        raise ConversionError(f"the file has no {options.checkpoint_key}: --checkpoint-key {networks[0]} is there")
    if options.kind:
        return options.kind
    if options.checkpoint_key:
        return "backbone"
    if len(networks) > 1:
        if any(entry.key.startswith("ibot_loss.") for entry in source.entries):
            raise ConversionError(
                "the file holds a run of DINOv2, of which one backbone is converted: --checkpoint-key teacher, "
                "or student"
            )
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
        self.source = source
        self.options = options
        self.taken: set[str] = set()  # keys of the source
        self.report = Report()
        self.architecture: Optional[Architecture] = None
        self.state: dict[str, np.ndarray] = {}
        self.layout: list[Slot] = []
        self.counters: dict[str, int] = {}
        self.fitted: list[str] = []

    # --- kinds ---

    def add_run(self) -> dict[str, Any]:
        """A DINO run: both networks and the centre."""
        for network in ("student", "teacher"):
            if network not in self.source.networks():
                raise ConversionError(f"the file has no {network}: it is no whole run")
            if "head" not in self.source.parts(network):
                raise ConversionError(
                    f"the {network} in the file has no projection head of DINO, so it is no whole run: "
                    "--checkpoint-key teacher takes the teacher's backbone"
                )
        student, teacher = (self._add_network(network, f"{network}.") for network in ("student", "teacher"))
        if student != teacher:
            raise ConversionError(f"student and teacher are not alike: {student} and {teacher}")
        center = self.source.parts("").get("center", {}).get("center")
        slot = Slot("dino_loss.center", "dino_loss.center", (1, student["head"]["out_dim"]), "same")
        self._fill("", [slot], {slot.torch_name: center} if center else {})
        return {"name": "DINO", **student}

    def add_network(self) -> dict[str, Any]:
        """Backbone and heads of one network."""
        network = self._network()
        return self._add_network(network, f"{network}." if network else "")

    def add_backbone(self) -> dict[str, Any]:
        """The backbone of the network that is asked for, nothing else."""
        network = self._network()
        section = self._add_backbone(network, "").section
        if self.options.kind or self.options.checkpoint_key:
            self._leave_rest(network)
        return section

    def add_linear(self) -> dict[str, Any]:
        """A linear classifier alone."""
        return self._add_linear(None)

    def add_probe(self) -> dict[str, Any]:
        """A backbone with a linear classifier."""
        network = self._network()
        return self._probe_section(self._add_linear(self._add_backbone(network, "backbone.")))

    def add_linear_on(self, backbone: Source) -> dict[str, Any]:
        """A linear classifier, and the backbone that it was trained on, which is in another file."""
        linear, self.source = self.source, backbone
        network = self._network()
        architecture = self._add_backbone(network, "backbone.")
        self._leave_rest(network)
        self._close()
        self.source = linear
        return self._probe_section(self._add_linear(architecture))

    def finish(self, kind: str, model: dict[str, Any]) -> Conversion:
        """Everything together; what no part has taken is left over."""
        self._close()
        return Conversion(
            kind, model, self.architecture, self.state, self.layout, self.counters, self.report, self.fitted
        )

    def _close(self) -> None:
        gone = {*self.taken, *self.report.not_asked}
        self.report.left_over += [entry.key for entry in self.source.entries if entry.key not in gone]
        self.taken = set()

    # --- parts ---

    def _leave_rest(self, network: str) -> None:
        """Only the backbone is wanted: everything else is not asked for, rather than left over."""
        self.report.not_asked += [
            entry.key
            for entry in self.source.entries
            if (entry.network, entry.part) != (network, "backbone") and entry.key not in self.taken
        ]

    def _network(self) -> str:
        """Whose backbone is meant: as asked for, else the teacher's, which is the better one."""
        networks = self.source.networks()
        wanted = self.options.checkpoint_key or "teacher"
        return wanted if wanted in networks else networks[0] if networks else ""

    def _add_network(self, network: str, prefix: str) -> dict[str, Any]:
        section: dict[str, Any] = {"backbone": self._add_backbone(network, f"{prefix}backbone.").section}
        parts = self.source.parts(network)
        for part in _HEADS:
            if part in parts:
                arguments = self._add_head(parts[part], f"{prefix}{part}.")
                section[part] = {"name": "DINOHead", **{k: v for k, v in arguments.items() if k != "in_dim"}}
        return section

    def _add_backbone(self, network: str, prefix: str) -> Architecture:
        entries = official(self.source.parts(network).get("backbone", {}))
        self.architecture = architecture = self._architecture(self._torch_shapes(entries))
        layout = slots(self.options.layer or architecture.blueprint())
        if self.options.layer is not None or self.options.arch:
            entries = self._by_own_names(network, layout, entries)
        if self.options.layer is not None:
            entries = self._fitted(layout, entries)
        self._fill(prefix, layout, entries)
        return architecture

    def _fitted(self, layout: list[Slot], entries: dict[str, Entry]) -> dict[str, Entry]:
        """``entries`` with a first convolution for as many channels, and positions for as large a grid, as the Layer
        has that they are for.
        """
        values = {slot.torch_name: entries[slot.torch_name].value for slot in layout if slot.torch_name in entries}
        values, inflated = inflate_state(values, {slot.torch_name: slot.shape for slot in layout})
        values, resized = resize_positions(values, self.options.layer)
        self.fitted = [*inflated, *resized]
        return {name: entry._replace(value=values.get(name, entry.value)) for name, entry in entries.items()}

    def _architecture(self, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        if self.options.layer is not None:
            return Architecture(type(self.options.layer).__name__)
        known = {key: value for key, value in self.options.arguments.items() if key not in _PROBE_ARGUMENTS}
        architecture = given(self.options.arch, shapes, known) if self.options.arch else infer(shapes, known)
        if self.source.is_clemsgrs and architecture.takes("pos_embed_mode"):
            return replace(architecture, arguments={"pos_embed_mode": "size", **architecture.arguments})
        return architecture

    def _by_own_names(self, network: str, layout: list[Slot], entries: dict[str, Entry]) -> dict[str, Entry]:
        """``entries``, and what of the file is called as the Layer calls it, whatever the usual names would say.

        A user's own Layer may well have an ``encoder.`` or a classifier in its backbone.
        """
        names = {*(slot.torch_name for slot in layout), *counters(layout)}
        found = {name: entry for name, entry in entries.items() if name in names}
        used = {entry.key for entry in found.values()}
        for entry in self.source.entries:
            if entry.network == network and entry.key not in used:
                words = entry.key.split(".")
                tails = (".".join(words[start:]) for start in range(len(words)))
                name = next((tail for tail in tails if tail in names and tail not in found), None)
                if name:
                    found[name] = entry
        return {**entries, **found}

    def _add_head(self, part: Mapping[str, Entry], prefix: str) -> dict[str, Any]:
        entries = official(part)
        arguments = infer_head(self._torch_shapes(entries))
        self._fill(prefix, slots(blueprint(DINOHead, arguments)), entries)
        return arguments

    def _add_linear(self, architecture: Optional[Architecture]) -> dict[str, Any]:
        parts = self.source.parts(self._network())
        part = next((name for name in _LINEAR_PARTS if name in parts), "")
        weight = parts.get(part, {}).get("weight")
        if weight is None or weight.value.ndim != 2 or 0 in weight.value.shape:
            raise ConversionError("the file holds no linear classifier (linear.weight [classes, features])")
        num_classes, in_dim = self._torch_shape("weight", weight.value)
        section = {"in_dim": in_dim, "num_classes": num_classes, **self._probe_input(architecture, in_dim, part)}
        entries = {f"linear.linear.{name}": entry for name, entry in parts[part].items()}
        if part == "concatenated" and section.get("avgpool"):
            turned = _interleaved(weight.value, section.get("n_last_blocks", 1))
            entries["linear.linear.weight"] = weight._replace(value=turned)
        layout = slots(blueprint(LinearClassifier, {"in_dim": in_dim, "num_classes": num_classes}))
        self._fill("", prefixed("linear.", layout), entries)
        return section

    def _probe_input(self, architecture: Optional[Architecture], in_dim: int, part: str) -> dict[str, Any]:
        """Which features a linear classifier of ``in_dim`` inputs sees: as asked for, else as published."""
        asked = {key: value for key, value in self.options.arguments.items() if key in _PROBE_ARGUMENTS}
        blocks, avgpool = asked.get("n_last_blocks", 1), asked.get("avgpool", False)
        if type(blocks) is not int or blocks < 1 or type(avgpool) is not bool:
            raise ConversionError(f"n_last_blocks ({blocks}) must be 1 or more, and avgpool ({avgpool}) true or false")
        layer = architecture.blueprint() if architecture else None
        times = in_dim // _width(layer) if layer else 0
        if part == "concatenated" and layer is None:
            times = 5 if in_dim % 5 == 0 else 2
        if part == "classifier" or (layer is not None and not hasattr(layer, "get_intermediate_layers")):
            found = {"n_last_blocks": 1, "avgpool": False}
        elif times == 2 or (times > 2 and part == "concatenated"):
            # ViT-B: one block and the mean of the patches. DINOv2: that, or four blocks and the mean.
            found = {"n_last_blocks": times - 1, "avgpool": True}
        else:  # ViT-S: four blocks. Alone, it does not show.
            found = {"n_last_blocks": times, "avgpool": False} if times else {}
        return {**found, **asked}

    def _probe_section(self, linear: dict[str, Any]) -> dict[str, Any]:
        architecture = self.architecture
        assert architecture is not None
        layer = architecture.blueprint()
        blocks, avgpool = linear.get("n_last_blocks", 1), linear.get("avgpool", False)
        times = blocks + avgpool if hasattr(layer, "get_intermediate_layers") else 1
        if _width(layer) * times != linear["in_dim"]:
            raise ConversionError(
                f"the linear classifier has {linear['in_dim']} inputs, and {architecture.name} with n_last_blocks="
                f"{blocks} and avgpool={avgpool} gives {_width(layer) * times}: set them with --set n_last_blocks=N "
                "--set avgpool=true, or give the backbone that it was trained on"
            )
        rest = {"num_classes": linear["num_classes"], "n_last_blocks": blocks, "avgpool": avgpool}
        return {"name": "LinearProbe", "backbone": architecture.section, **rest}

    # --- tensors ---

    def _torch_shapes(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
        return {name: self._torch_shape(name, entry.value) for name, entry in entries.items()}

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
        for name in counters(layout):
            if name in entries and entries[name].value.size == 1 and entries[name].value.dtype.kind in "iu":
                self.counters[prefix + name] = int(entries[name].value.item())
                report.counters.append(entries[name].key)
                self.taken.add(entries[name].key)
        for slot in layout:
            entry = entries.get(slot.torch_name)
            if entry is None:
                report.missing.append(prefix + slot.torch_name)
                continue
            self.taken.update((entry.key, *entry.others))
            if problem := self._misfit(slot, entry.value):
                report.misshapen.append(f"{entry.key} ({problem})")
                continue
            report.matched += (entry.key, *entry.others)
            if entry.key != prefix + slot.name:
                report.renamed += [(key, prefix + slot.name) for key in (entry.key, *entry.others)]
            is_torch = self.source.layout == "torch"
            if is_torch and slot.layout == "transposed":
                report.transposed += (entry.key, *entry.others)
            self.state[prefix + slot.name] = slot.from_torch(entry.value) if is_torch else entry.value
        self.layout += prefixed(prefix, layout)

    def _misfit(self, slot: Slot, value: np.ndarray) -> str:
        """Why ``value`` is none for ``slot``; empty where it is."""
        if value.dtype.kind != "f" and value.dtype != BFLOAT16:
            return f"file {value.dtype}, architecture floating-point numbers"
        shape = self._torch_shape(slot.torch_name, value)
        return "" if shape == slot.torch_shape else f"file {list(shape)}, architecture {list(slot.torch_shape)}"


def _width(backbone: nn.Layer) -> int:
    if not hasattr(backbone, "embed_dim"):
        raise ConversionError(f"the backbone {type(backbone).__name__} has no embed_dim: a linear classifier needs it")
    return backbone.embed_dim


def _interleaved(weight: np.ndarray, blocks: int) -> np.ndarray:
    """DINOv2's columns [cls_1 .. cls_n, mean] in the order of passl's probe, whose last pair is interleaved.

    Raises:
        ConversionError: the columns are no such features.
    """
    if weight.shape[1] % (blocks + 1):
        raise ConversionError(
            f"the linear classifier has {weight.shape[1]} inputs, which are not those of {blocks} blocks and a mean: "
            "give --set n_last_blocks=N, and --set avgpool=false where there is no mean"
        )
    columns = np.arange(weight.shape[1]).reshape(blocks + 1, -1)
    return weight[:, np.concatenate([columns[:-2].ravel(), columns[-2:].T.ravel()])]
