"""The reward that a policy implies beside its reference."""

from rlhf.data.records import Samples, Scorer, Scores


def implicit_reward(
    policy: str,
    reference: str,
    max_prompt_length: int,
    max_response_length: int,
    batch_size: int = 64,
) -> Scorer:
    """Return a scorer of DPO's implicit reward (Rafailov et al. 2023, eq. 5), over beta:

        r(response) = log p(response | prompt) - log p_reference(response | prompt)      nats

    The part that depends on the prompt alone is left out: compare answers to one prompt. Texts are
    encoded by the policy's tokenizer. Raises UserError where a folder is no policy, or the lengths
    (tokens) exceed the positions of a model.
    """
    import torch

    from rlhf.compare.runs import load_policies
    from rlhf.data.encode import encode_prompt, encode_response
    from rlhf.model.logprobs import completion_batch, response_logprobs
    from rlhf.model.packing import head_is_plain
    from rlhf.model.tokenizer import load_tokenizer
    from rlhf.ranks.distributed import own_device

    device = own_device()
    tokenizer = load_tokenizer(policy)
    models = load_policies([policy, reference], device, max_prompt_length, max_response_length)

    @torch.no_grad()
    def score(samples: Samples) -> Scores:
        prompts, responses = [], []
        for number, prompt in enumerate(samples.prompts):
            prompts.append(encode_prompt(tokenizer, prompt, samples.metadata[number].get("tools")))
            answer = samples.responses[number], samples.ended[number]
            responses.append(encode_response(tokenizer, *answer))
        total = []
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            columns = completion_batch(
                prompts[part], responses[part], tokenizer.pad_token_id, device
            )
            logprobs = []
            for model, context in models:
                with context():
                    plain = head_is_plain(model)
                    logprobs.append(response_logprobs(model, *columns, plain_head=plain)[0])
            # both are 0 where there is no token
            total += (logprobs[0] - logprobs[1]).sum(-1).tolist()
        return Scores(total, {"implicit": total})

    return score
