"""The declarative, streaming parser of model turns that transformers ships, imported without its advice on PyTorch."""

import logging


def _not_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


_logger = logging.getLogger("transformers")
_logger.addFilter(_not_advice)
try:
    from transformers.utils.chat_parsing import ResponseParser
    from transformers.utils.chat_parsing.content_parsers import parse_content, process_field
    from transformers.utils.chat_parsing.response_templates import (
        ResponseTemplate,
        ResponseTemplateField,
        load_response_template,
    )
finally:
    _logger.removeFilter(_not_advice)

__all__ = [
    "ResponseParser",
    "ResponseTemplate",
    "ResponseTemplateField",
    "load_response_template",
    "parse_content",
    "process_field",
]
