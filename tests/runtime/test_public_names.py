import trtower


def test_public_names_are_these() -> None:
    assert sorted(trtower.__all__) == [
        "BackendError",
        "BatchReport",
        "BuildError",
        "Bundle",
        "BundleError",
        "CLIPVisionTower",
        "CLIPVisionTowerDynamicS2",
        "CLIPVisionTowerS2",
        "CheckpointError",
        "ConfigError",
        "EngineOptions",
        "InputError",
        "Installation",
        "MissingExtraError",
        "TrtowerError",
        "VisionTower",
        "__version__",
        "build_vision_tower",
        "encode_for",
        "install",
        "uninstall",
    ]
