"""The Celery application for `celery -A workers.app worker`, and for Flower."""

from typing import Any

from celery.signals import setup_logging

from orchestrator.broker import make_app
from orchestrator.config import ConfigManager
from orchestrator.logs import Logger
from workers.tasks import register
from workers.transport import install

intake = install()
config = ConfigManager()
settings = config.settings
Logger.init(settings.logging.level, settings.logging.format)


def leave_logging_alone(**_: Any) -> None:
    """Signal: Celery is about to set up a logging of its own, with its level; with a receiver here it does not."""


setup_logging.connect(leave_logging_alone, weak=False)
app = make_app(settings.redis_url or "redis://localhost:6379/0", tuple(settings.providers), settings.queue_prefix)
register(app, config, intake)
