"""What `--data` of the judging commands may say."""

from pydantic import ValidationError

from chatllama.config.sources import DataSource
from chatllama.config.yaml_reader import parse_value


def data_source(text: str) -> DataSource:
    """A path, pattern or hub id; or a config's source in braces, such as {path: F, split: test}.

    Raises:
        ValueError: an unknown key or a wrong value.
    """
    if not text.startswith("{"):
        return DataSource(path=text)
    try:
        return DataSource.model_validate(parse_value(text))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"--data {text}: {'; '.join(wrong)}") from None
