"""What the Hub refuses in the metadata of a model card, as far as its rules are known."""

import re

import yaml

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "other"}
ID = re.compile(r"^(?:[\w-][\w.-]*/)?[\w-][\w.-]*$")


def metadata_errors(text):
    """What the Hub refuses in the metadata of a card, as far as its rules are known."""
    found = re.match(r"^---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["not a mapping"]
    errors = []
    for name, where in (("base_model", "models"), ("datasets", "datasets")):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not ID.match(value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co/{where}.')
    for name in ("license", "pipeline_tag", "library_name"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for index, model in enumerate(data.get("model-index", [])):
        errors += [f"model-index[{index}].{error}" for error in _index_errors(model)]
    return errors


def _index_errors(model):
    if not isinstance(model.get("name"), str) or not model.get("results"):
        yield "name and results are required"
    for result in model.get("results", []):
        named = result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")
        if not all(isinstance(value, str) and value for value in named) or not ID.match(str(named[1])):
            yield f"results: {named} are no task, data set and its name"
        for metric in result["metrics"]:
            value = metric.get("value")
            if not isinstance(metric.get("type"), str) or isinstance(value, str | None) or value != value:
                yield f"results.metrics: {metric} is no number with a type"
