"""The program: reads the flags, listens, loads the model while the first clients are told to wait, and serves until a signal."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from pyllama import __version__, models, pull
from pyllama.core import CoreError, cpu_name, interleave_memory, memory_nodes
from pyllama.draft import DraftModel
from pyllama.engine import Engine
from pyllama.server import flags
from pyllama.server.app import create_app
from pyllama.server.http import Server
from pyllama.server.log import log, log_request, progress_line, set_up
from pyllama.server.service import Defaults, Service, SystemPrompt

__all__ = ["Program", "main"]

_QUICK_REQUESTS = 8
"""Threads beyond those that may wait for the model, so that e.g. /health is always answered."""
_STEP_SECONDS = 3.0
"""How long a stop waits for the model's last step."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOAD_ERRORS = (ValueError, CoreError, pull.PullError, MemoryError)


class Program:
    """A server with its model.

    Raises:
        OSError: it is not possible to listen where the settings say, or the system prompt's file cannot be read.
        ValueError: the system prompt's file is not as it should be.
    """

    def __init__(self, settings: flags.Settings) -> None:
        self.settings = settings
        self.service = Service(
            Defaults(
                name=settings.alias or str(settings.model or pull.DEFAULT),
                n_predict=settings.n_predict,
                seed=settings.seed,
                embedding=settings.embedding,
                api_keys=settings.api_key + settings.api_key_file,
                queue=settings.queue,
            )
        )
        if settings.system_prompt_file is not None:
            self.service.system_prompt = _read_system_prompt(settings.system_prompt_file)
        application = create_app(self.service, settings.path)
        try:
            self.server = Server(
                application,
                settings.host,
                settings.port,
                n_threads=settings.parallel + settings.queue + _QUICK_REQUESTS,
                timeout=settings.timeout,
                on_request=log_request,
            )
        except OSError as error:
            where, why = f"{settings.host}:{settings.port}", error.strerror or error
            raise OSError(f"cannot listen on {where}: {why}") from error
        self._engine: Engine | None = None
        self._failed = False

    def run(self) -> int:
        """Serves until :meth:`stop`; returns the exit status."""
        for host, port in self.server.addresses:
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        threading.Thread(target=self._load, name="pyllama-load", daemon=True).start()
        self.server.run(on_stop=self.service.stop)
        status = 1 if self._failed else 0
        if self._engine is not None and not self._engine.close(timeout=_STEP_SECONDS):
            log.warning("a step of the model takes long; it is abandoned")
            logging.shutdown()
            os._exit(status)  # the usual way out would wait for the step
        return status

    def stop(self) -> None:
        """Makes :meth:`run` return within seconds. Any thread and any signal handler may call this."""
        self.server.stop()

    def _load(self) -> None:
        s = self.settings
        path = s.model
        n_guess = s.draft_max if s.lookup or s.model_draft else 0
        try:
            path = path or pull.path_of()
            log.info("loading %s", path)
            if s.numa:
                _spread_memory()
            model = models.load(
                path,
                n_ctx=s.ctx_size,
                n_threads=s.threads,
                n_threads_batch=s.threads_batch,
                n_batch=s.batch_size,
                max_sequences=s.parallel,
                kv_type=s.kv_type,
                mmap=not s.no_mmap,
                mlock=s.mlock,
                rope=_rope_options(s),
                progress=progress_line(path.name),
            )
            draft = None
            if s.model_draft is not None:
                path = s.model_draft
                log.info("loading %s", path)
                draft = DraftModel.load(path, model, s.parallel, n_guess, mmap=not s.no_mmap, mlock=s.mlock)
            n_lookup = n_guess if s.lookup else 0
            self._engine = Engine(model, s.parallel, continuous=s.cont_batching, n_lookup=n_lookup, draft=draft)
            self.service.start(self._engine, chat_template=s.chat_template)
            _spare_what_stays()
        except OSError as error:
            self._fail(f"{path} cannot be loaded: {error.strerror or error}")
        except _LOAD_ERRORS as error:
            self._fail(f"{path} cannot be loaded: {str(error) or type(error).__name__}")
        except BaseException:
            self._fail("the model cannot be loaded")
            raise
        else:
            log.debug(
                "%.1f M parameters in %.1f MB; %s kernels; %d threads, %d for prompts",
                model.n_params / 1e6,
                model.n_bytes / 1e6,
                cpu_name(),
                model.n_threads,
                model.n_threads_batch,
            )
            log.info(
                "%s is ready: %s, %d tokens of context, %d slots",
                model.name,
                model.architecture,
                model.n_ctx,
                s.parallel,
            )

    def _fail(self, message: str) -> None:
        log.error("%s", message)
        self._failed = True
        self.stop()


def _rope_options(settings: flags.Settings) -> models.RopeOptions:
    return models.RopeOptions(
        scaling=settings.rope_scaling,
        freq_base=settings.rope_freq_base,
        freq_scale=settings.rope_freq_scale,
        yarn_ext_factor=settings.yarn_ext_factor,
        yarn_attn_factor=settings.yarn_attn_factor,
        yarn_beta_fast=settings.yarn_beta_fast,
        yarn_beta_slow=settings.yarn_beta_slow,
        yarn_orig_ctx=settings.yarn_orig_ctx,
    )


def _spare_what_stays() -> None:
    """Garbage is not looked for among what has been loaded, which takes 25 ms at a time while all streams wait."""
    gc.collect()
    gc.freeze()


def _spread_memory() -> None:
    """What ``--numa`` asks for, before there are threads and memory; says so if that is nothing."""
    nodes = memory_nodes()
    if len(nodes) == 1:
        log.warning("--numa has no effect: this machine has one memory node")
        return
    try:
        interleave_memory(nodes)
    except CoreError as error:
        log.warning("--numa has no effect: %s", error)
    else:
        log.info("memory is spread over %d nodes", len(nodes))


def _read_system_prompt(path: Path) -> SystemPrompt:
    """From a file with the JSON that /completion takes as ``system_prompt``, on its own or as a member; or with the text."""
    try:
        text = path.read_bytes().decode()
        if not text.lstrip().startswith("{"):
            return SystemPrompt(text)
        value = json.loads(text)
    except ValueError as error:  # of json, or of a wrong encoding
        raise ValueError(f"{path} is neither JSON nor text: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    try:
        return SystemPrompt.read(value.get("system_prompt", value))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main(argv: Sequence[str] | None = None, prog: str = "server.py") -> int:
    """The command; returns the exit status."""
    settings = flags.parse(argv, prog=prog)
    set_up(as_json=settings.log_format == "json", verbose=settings.verbose)
    log.info("pyllama %s", __version__)
    for line in settings.without_effect:
        log.warning("%s", line)
    try:
        program = Program(settings)
    except (OSError, ValueError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1

    def stop(_signal: int, _frame: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)  # who cannot wait sends another one
        program.stop()

    for number in _SIGNALS:
        signal.signal(number, stop)
    return program.run()
