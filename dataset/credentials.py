"""Keys and settings of S3 from the files that `aws configure` writes, which obstore does not read."""

import configparser
import os
from pathlib import Path

from imagefeed.dataset.errors import UserError

# If one is set, obstore's own chain has credentials: keys, a web identity, or those of a container.
GIVEN = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
NAMES = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
VARIABLES = {
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
}


def from_files() -> dict[str, str]:
    """obstore's arguments for the profile AWS_PROFILE, or default, as far as the environment does not give them. Raises UserError
    if a profile is named that is in neither file."""
    profile = os.environ.get("AWS_PROFILE") or "default"
    found = _section("AWS_CONFIG_FILE", "config", "default" if profile == "default" else f"profile {profile}")
    found |= _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    if not found and os.environ.get("AWS_PROFILE"):
        raise UserError(
            f"AWS_PROFILE is {profile}, which is neither in ~/.aws/config nor in ~/.aws/credentials; add it, or unset it"
        )
    settings = {NAMES[key]: value for key, value in found.items() if key in NAMES}
    if any(map(os.environ.get, GIVEN)) or on("AWS_SKIP_SIGNATURE"):
        settings = {name: value for name, value in settings.items() if name in VARIABLES}
    return {name: value for name, value in settings.items() if not any(map(os.environ.get, VARIABLES.get(name, ())))}


def has_credentials(settings: dict[str, str]) -> bool:
    """Whether the environment or these settings have credentials, or none are needed."""
    return "access_key_id" in settings or on("AWS_SKIP_SIGNATURE") or any(map(os.environ.get, GIVEN))


def on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _section(variable: str, name: str, section: str) -> dict[str, str]:
    path = Path(os.environ.get(variable) or Path("~/.aws", name)).expanduser()
    parser = configparser.RawConfigParser(default_section="")  # whose [default] is a profile like others
    try:
        parser.read(path, "utf-8")
    except (configparser.Error, UnicodeError, OSError) as error:
        raise UserError(f"{path}: not readable ({' '.join(str(error).split())}); correct it, or unset AWS_PROFILE") from None
    return dict(parser[section]) if parser.has_section(section) else {}
