"""LangChain and LlamaIndex call the endpoint as they call OpenAI's. In an environment of their own:

pip install langchain-openai llama-index-llms-openai-like
"""

import pytest

pytestmark = pytest.mark.slow
QUESTION = "where is my parcel?"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_langchain(name, url, runs, sampler):
    langchain_openai = pytest.importorskip(
        "langchain_openai", reason="pip install langchain-openai"
    )
    model = langchain_openai.ChatOpenAI(model=name, base_url=url, api_key="none", **GREEDY)
    system = {"role": "system", "content": "be kind"}
    messages = [system, {"role": "user", "content": QUESTION}]
    path = path_of(name, runs)
    expected, ids, _ = sampler(path, messages, 12)
    answer = model.invoke([("system", "be kind"), ("human", QUESTION)])
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == len(ids)
    pieces = [piece.content for piece in model.stream(messages)]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 2
    # a chain, with several inputs at once
    prompts = pytest.importorskip("langchain_core.prompts")
    chain = prompts.ChatPromptTemplate.from_messages([("human", "{question}")]) | model
    questions = [QUESTION, "thank you"]
    answers = chain.batch([{"question": question} for question in questions])
    for question, found in zip(questions, answers, strict=True):
        asked = [{"role": "user", "content": question}]
        assert found.content == sampler(path, asked, 12)[0]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_llama_index(name, url, runs, sampler):
    llms = pytest.importorskip(
        "llama_index.llms.openai_like", reason="pip install llama-index-llms-openai-like"
    )
    core = pytest.importorskip("llama_index.core.llms")
    model = llms.OpenAILike(
        model=name, api_base=url, api_key="none", is_chat_model=True, context_window=512, **GREEDY
    )
    path = path_of(name, runs)
    asked = [{"role": "user", "content": QUESTION}]
    expected = sampler(path, asked, 12)[0]
    messages = [core.ChatMessage(role="user", content=QUESTION)]
    assert model.chat(messages).message.content == expected
    pieces = [piece.delta or "" for piece in model.stream_chat(messages)]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 2
    # with a text, which a chat model takes as a user's message
    assert model.complete(QUESTION).text == expected
    # the endpoint that continues a text
    plain = model.model_copy(update={"is_chat_model": False})
    assert plain.complete("where is").text == continued(path, "where is")


def path_of(name, runs):
    return dict(zip(("sft", "ppo"), runs, strict=True))[name]


def continued(path, text):
    """Return what the plain sampler writes after a text."""
    from rlhf.data.encode import decode_response
    from rlhf.engines import hf
    from rlhf.engines.sampling import Sampling
    from rlhf.model.loading import load_model, trainable_policy
    from rlhf.model.tokenizer import stop_ids

    initial = load_model(path)
    policy, tokenizer = trainable_policy(initial, None), initial.tokenizer
    ids = tokenizer(text).input_ids
    stops = stop_ids(tokenizer, initial.model)
    done = hf.generate(policy, [ids], [0], Sampling(12, 0.0), stops, tokenizer.pad_token_id)
    return decode_response(tokenizer, done.response_ids[0])
