"""The example manifests are what Kubernetes, KubeRay and Ray accept: checked against their schemas, not run."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parent.parent / "examples" / "kubernetes"
KUBERNETES = "1.33"
"""A version that clusters run; the fields that the examples use are older."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pods(ray_service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}} | group["template"] for group in groups]


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("document", documents("triton.yaml"), ids=lambda document: str(document["kind"]))
def test_kubernetes_accepts_triton(document: dict[str, Any]) -> None:
    validate(document)
    unknown = deepcopy(document)
    unknown["spec"]["unknown"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(unknown)


def test_kubernetes_accepts_the_pods_and_service_of_ray() -> None:
    ray_service, service = documents("ray.yaml")
    for pod in pods(ray_service):
        validate(pod)
    validate(service)


def refuse_unknown(schema: Any) -> Any:
    """Return a schema that refuses fields which it does not name; Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [refuse_unknown(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: refuse_unknown(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict) and "additionalProperties" not in schema:
        strict["additionalProperties"] = False
    return strict


@pytest.mark.skipif("RAYSERVICE_CRD" not in os.environ, reason="needs KubeRay's ray.io_rayservices.yaml")
def test_kuberay_accepts_the_service() -> None:
    """`RAYSERVICE_CRD=ray.io_rayservices.yaml pytest tests/test_kubernetes.py`, with the file of KubeRay's chart."""
    ray_service = documents("ray.yaml")[0]
    definition = yaml.safe_load(Path(os.environ["RAYSERVICE_CRD"]).read_text(encoding="utf-8"))
    versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    schema = refuse_unknown(versions["v1"]["properties"]["spec"])
    jsonschema.validate(ray_service["spec"], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(ray_service["spec"] | {"unknown": 1}, schema)


def test_both_serve_grpc_where_the_page_says() -> None:
    ray_service, service = documents("ray.yaml")
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    (port,) = service["spec"]["ports"]
    assert config["grpc_options"]["port"] == port["port"] == port["targetPort"]
