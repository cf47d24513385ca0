"""What changes over the training of a wrapped model, by the engine's schedules."""

from __future__ import annotations

from passl.schedules import Timeline, cosine
from passl.wrapper.conf import DINOConf


class Clock:
    """Teacher temperature and momentum at a step, counted from 0 as `ema_update` does.

    Without `len_train_loader` nobody knows how many steps there are: the momentum then stays at its first value, and
    the temperature of both versions changes with the epoch that forward is told.
    """

    def __init__(self, conf: DINOConf) -> None:
        self.steps_per_epoch = conf.len_train_loader
        per_step = conf.version == "v2" and conf.len_train_loader is not None
        self._temperature_of_step = per_step
        length = conf.len_train_loader or 1
        self.total_steps = conf.epochs * length
        timeline = Timeline(self.total_steps if per_step else conf.epochs, length if per_step else 1)
        self._temperature = cosine(
            timeline,
            base=conf.teacher_temp,
            final=conf.teacher_temp,
            warmup=conf.warmup_teacher_temp_epochs,
            warmup_start=conf.warmup_teacher_temp,
        )
        final = conf.momentum_teacher if conf.len_train_loader is None else 1.0
        self._momentum = cosine(Timeline(self.total_steps, length), base=conf.momentum_teacher, final=final)

    def epoch(self, epoch: int, step: int) -> int:
        """The epoch that forward is told, or that of the coming step if that is later: a plain loop need not tell."""
        return epoch if self.steps_per_epoch is None else max(epoch, step // self.steps_per_epoch)

    def teacher_temp(self, epoch: int, step: int) -> float:
        """By epoch, and in version 2 by step: the coming one, or the first of the epoch if that is later."""
        epoch = self.epoch(epoch, step)
        if not self._temperature_of_step:
            return self._temperature(epoch)
        return self._temperature(max(step, epoch * self.steps_per_epoch))

    def momentum(self, step: int) -> float:
        """Half a cosine from `momentum_teacher` to 1 over all epochs, and 1 behind them."""
        return self._momentum(min(step, self.total_steps))
