"""PPO with three adapters on one base: the policy's, the critic's and the reward's. ppo.py otherwise.

One frozen model in memory serves as policy, reference (its adapter off), critic and reward model. With no arguments: a
built-in small model writes reviews of films that a built-in reward adapter likes; about two minutes on two cores. A
reward adapter of one's own is what reward_modeling.py --use_peft saves, trained on the model that the policy starts
from. How much it saves: bench_ppo.py.

    accelerate launch scripts/ppo_multi_adapter.py
    accelerate launch scripts/ppo_multi_adapter.py --config run.yaml --learning_rate 1e-5 --kl_coef 0.05
    accelerate launch scripts/ppo_multi_adapter.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \\
        --lora_r 16 --value_model adapter --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_funcs adapter:runs/reward_modeling --output_dir out
    accelerate launch scripts/ppo_multi_adapter.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --use_peft \\
        --load_in_4bit --value_model adapter --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_funcs adapter:runs/reward_modeling --output_dir out
    accelerate launch --config_file shared/runtime/profiles/multi_gpu.yaml --num_processes 8 \\
        scripts/ppo_multi_adapter.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --use_peft --value_model adapter \\
        --dataset_name trl-lib/ultrafeedback-prompt --reward_funcs adapter:runs/reward_modeling --output_dir out

`trialign ppo-multi-adapter` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("ppo-multi-adapter", __doc__)
