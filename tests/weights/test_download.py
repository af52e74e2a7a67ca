"""weights/download.py: where the published files are, and which host is asked first."""

import pytest
from hub import CONTENT, FILE, NAME, PATH, SHA256

from weights import download
from weights.download import addresses, fetch
from weights.names import WeightsError

OFFICIAL = "OFA-Sys/chinese-clip-vit-base-patch16/clip_cn_vit-b-16.pt"
MODELSCOPE = "/api/v1/models/AI-ModelScope/chinese-clip-vit-base-patch16/repo?Revision=master&FilePath=" + FILE


def test_addresses(monkeypatch):
    for variable in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN", "ZHCLIP_HUB"):
        monkeypatch.delenv(variable, raising=False)
    assert addresses("hfl/rbt3/model.bin") == ["https://huggingface.co/hfl/rbt3/resolve/main/model.bin"]
    ours = ["https://huggingface.co" + PATH, "https://modelscope.cn" + MODELSCOPE]
    assert addresses(OFFICIAL) == ours
    monkeypatch.setenv("ZHCLIP_HUB", "modelscope")
    assert addresses(OFFICIAL) == ours[::-1]
    assert addresses("datasets/OFA-Sys/some/one.zip") == ["https://huggingface.co/datasets/OFA-Sys/some/resolve/main/one.zip"]
    monkeypatch.setenv("HF_ENDPOINT", "https://my.mirror/")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.cn")
    assert addresses(OFFICIAL) == ["https://www.modelscope.cn" + MODELSCOPE, "https://my.mirror" + PATH]
    assert addresses("https://elsewhere/file.pt") == ["https://elsewhere/file.pt"]
    monkeypatch.setenv("ZHCLIP_HUB", "github")
    with pytest.raises(WeightsError, match="ZHCLIP_HUB is 'github'; expected one of huggingface, modelscope"):
        addresses(OFFICIAL)


@pytest.mark.parametrize("first,down", [("huggingface", "huggingface"), ("modelscope", "modelscope"),
                                        ("modelscope", "huggingface")])
def test_the_other_host_is_asked_if_one_does_not_answer(first, down, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZHCLIP_HUB", first)
    hub.down = (down,)
    path = fetch(NAME, str(tmp_path))
    assert open(path, "rb").read() == CONTENT
    said = capsys.readouterr().err
    assert ("trying the next host" in said) == (first == down) and "publishes no SHA-256" not in said
    host = "modelscope" if down == "huggingface" else "huggingface"
    assert [("modelscope" if path.startswith("/api/") else "huggingface") for path, asked in hub.requests if asked] == [host]


def test_modelscope_publishes_the_checksum_in_its_list(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "addresses", lambda source: [hub.endpoint + MODELSCOPE])
    hub.etag = "0" * 64
    with pytest.raises(WeightsError, match=f"SHA-256 is {SHA256}, expected 0000"):
        fetch(NAME, str(tmp_path))
    assert [path.name for path in (tmp_path / NAME).iterdir()] == [FILE + ".lock"]
    hub.etag = None
    assert open(fetch(NAME, str(tmp_path)), "rb").read() == CONTENT


def test_a_part_from_one_host_is_continued_at_the_other(hub, tmp_path, monkeypatch):
    hub.cuts, hub.down = [123_000], ()
    original = download.download

    def gone_after(url, path, tries):
        try:
            return original(url, path, 1)
        finally:
            hub.down = ("huggingface",)
    monkeypatch.setattr(download, "download", gone_after)
    assert open(fetch(NAME, str(tmp_path)), "rb").read() == CONTENT
    assert [asked for path, asked in hub.requests if "modelscope" in path.lower() and asked] == ["bytes=123000-299999"]


def test_the_token_goes_to_hugging_face_alone(hub, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("hf_secret\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(token))
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.endpoint.replace("127.0.0.1", "localhost"))
    hub.elsewhere = True
    fetch(NAME, str(tmp_path / "a"))
    assert {path for path, _ in hub.tokens} == {PATH} and any(path.startswith("/bytes") for path, _ in hub.requests)
    assert (PATH, "Bearer hf_secret") in hub.tokens
    hub.tokens, hub.down = [], ("huggingface",)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    fetch(NAME, str(tmp_path / "b"))
    assert {token for _, token in hub.tokens} == {"Bearer hf_other"}
    assert {path for path, _ in hub.tokens} == {PATH}


def test_names_of_qa_clip_are_on_hugging_face(hub, tmp_path):
    hub.add("TencentARC/QA-CLIP/QA-CLIP-large-336.pt", b"weights")
    assert open(fetch("qa-ViT-L-14-336", str(tmp_path)), "rb").read() == b"weights"


def test_openais_addresses_carry_their_checksum(hub, tmp_path, monkeypatch):
    for sha256, right in ((SHA256, True), ("1" * 64, False)):
        monkeypatch.setitem(download.SOURCES, NAME, f"{hub.endpoint}/clip/models/{sha256}/{FILE}")
        root = tmp_path / sha256
        if right:
            assert open(fetch(NAME, str(root)), "rb").read() == CONTENT
        else:
            with pytest.raises(WeightsError, match="SHA-256"):
                fetch(NAME, str(root))


def test_every_openai_address_carries_one():
    urls = [url for url in download.SOURCES.values() if url.startswith(download.OPENAI)]
    assert len(urls) == 5
    for url in urls:
        assert len(url.split("/")[-2]) == 64 and int(url.split("/")[-2], 16)


def test_proxies_are_used(hub, tmp_path, monkeypatch):
    proxy = hub.endpoint  # sees the whole address of another host
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(download, "SOURCES", {NAME: "hfl/rbt3/pytorch_model.bin"})
    hub.statuses = [404]
    with pytest.raises(WeightsError, match="404"):
        fetch(NAME, str(tmp_path))
    assert hub.statuses == []  # which the proxy said
