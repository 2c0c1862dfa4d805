"""The Celery application for `celery -A workers.app worker`, and for Flower."""

from orchestrator.broker import make_app
from orchestrator.config import ConfigManager
from orchestrator.logs import Logger
from workers.tasks import register
from workers.transport import install

install()
config = ConfigManager()
settings = config.settings
Logger.init(settings.logging.level, settings.logging.format)
app = make_app(settings.redis_url or "redis://localhost:6379/0", tuple(settings.providers), settings.queue_prefix)
register(app, config)
