"""Chinese facts of the demo corpus, in the format of `demo_corpus_en` (an indented line continues the one above it)."""

FACTS_ZH = """
@quantize4 5
h 把模型量化到4位 | 把模型量化成 4 位 | 量化到 4 bit | 做 int4 量化 | 得到 4 位模型 | 把 GLM-4-9B 量化到 4 位
q 4位量化 | int4 量化 | 4 bit 量化的命令是什么？ | 量化成四位用什么命令？
a 运行 `glm4run quantize ./glm-4-9b-chat -o ./glm-4-9b-chat-int4 --bits 4`，
  然后用 `glm4run chat ./glm-4-9b-chat-int4` 对话。
@quantize8 4
h 把模型量化到8位 | 把模型量化成 8 位 | 量化到 8 bit | 做 int8 量化 | 得到 8 位模型 | 把 GLM-4-9B 量化到 8 位
q 8位量化 | int8 量化 | 8 bit 量化的命令是什么？ | 量化成八位用什么命令？
a 运行 `glm4run quantize ./glm-4-9b-chat -o ./glm-4-9b-chat-int8 --bits 8`。它比 4 位大，但更接近原模型。
@quantize 4
h 量化模型 | 压缩模型 | 让模型变小 | 转换模型 | 量化 GLM-4-9B | 使用量化命令
q 量化 | 怎样开始量化？ | 量化用哪个命令？ | 量化命令是什么？
a 用 `glm4run quantize SOURCE -o DIR --bits 4` 或 `--bits 8`。它读取检查点，打包权重，并显示进度条。
@bits 2
w --bits
q 用 4 位还是 8 位？ | 4位和8位哪个好？ | int4 和 int8 有什么区别？ | 应该选几位？
a `--bits` 可以是 4 或 8。4 位最小最快，8 位最接近原模型。内存紧张时先用 4 位。
@groupsize 2
h 选择分组大小 | 设置分组大小 | 选 group size
w --group-size | 分组大小 | group size
q 分组大小选多少？ | 可以用 256 吗？
a 加上 `--group-size 32`、`64` 或 `128`。分组越小越精确，文件稍大。256 不行，因为 13696 不能被 256 整除。
@output 2
h 选择输出目录 | 设置输出文件夹 | 保存量化后的模型
w -o
q 量化后的模型在哪里？ | 输出到哪里？ | 结果保存在哪里？
a 用 `-o DIR`，例如 `-o ./glm-4-9b-chat-int4`。打包的模型和报告都写到这个文件夹。
@overwrite 1
h 覆盖输出目录 | 覆盖已有的文件夹
w --overwrite
q 输出文件夹已经存在怎么办？
a 在 `glm4run quantize` 后加上 `--overwrite`，就会替换输出文件夹里的内容。
@method 2
h 选择量化方法 | 设置量化方法
w --method
q 有哪些量化方法？ | 用哪种量化方法？ | 量化方法有哪些？
a `--method` 决定权重如何取整。这个版本有 `rtn`，也就是直接取整，不需要校准文本。
@lmhead 1
h 量化 lm_head
w --lm-head-bits | lm_head
a `--lm-head-bits` 设置输出头的位数，16 或 8。用 8 时 int4 模型大约小 0.6 GB。
@resume 2
h 继续中断的量化 | 恢复量化
q 量化中断了怎么办？ | 量化时崩溃了怎么办？ | 可以断点续传吗？
a 再运行一次同样的 `glm4run quantize` 命令。不会留下写了一半的文件，文件夹只在完成后才出现。
@formats 2
h 读取其他格式
q 支持哪些格式？ | 可以加载哪些模型格式？
a 可以读取 GLM-4-9B 系列的 safetensors 检查点：原始格式、-hf、0414，以及自己打包的文件夹。
@packed 2
w 打包格式 | compressed-tensors | pack-quantized
q 量化后的模型是什么格式？ | 输出是什么格式？ | 文件格式是什么？
a 打包的模型是普通的模型文件夹，采用 compressed-tensors 的 `pack-quantized` 格式，权重在 safetensors 文件里。
@vllm 1
h 在 vLLM 里使用打包的模型 | 用 transformers 加载打包的模型
q vLLM 能读吗？ | transformers 能加载吗？ | 其他程序能用吗？
a 打包的文件夹是 compressed-tensors 格式，vLLM、SGLang 和 transformers 也能读取。
@chat 4
h 聊天 | 开始聊天 | 和模型对话 | 开始对话 | 使用 chat 命令
w glm4run chat
q 对话 | 聊天用哪个命令？ | 在终端里能聊天吗？
a 运行 `glm4run chat` 或 `glm4run chat ./glm-4-9b-chat-int4`。输入消息后按回车，`/exit` 退出。
@exit 3
h 退出聊天 | 退出 | 离开对话 | 结束对话 | 关闭聊天
w /exit
q 退出 | 怎么退出？
a 输入 `/exit` 就可以退出聊天。
@clear 2
h 清空对话 | 清除历史 | 重新开始对话
w /clear
q 清空 | 能忘记前面的话吗？
a 输入 `/clear` 清空对话，重新开始。
@help 3
h 查看帮助 | 看所有命令 | 得到帮助
w /help
q 帮助 | 帮帮我 | 有哪些命令？ | 需要帮助。 | 你能帮我吗？
a 在聊天里输入 `/help`。在终端运行 `glm4run --help`，或者某个命令的帮助，如 `glm4run quantize --help`。
@interrupt 2
h 停止回答 | 中断回答 | 让它停下来 | 停止生成
w Ctrl-C
q 回答太长怎么停？
a 按 Ctrl-C 就可以停止回答。
@generate 3
h 生成文本 | 只问一个问题 | 使用 generate 命令 | 得到一个回答
w glm4run generate
q 生成 | 生成文本用哪个命令？
a 运行 `glm4run generate "你的问题"`，用 `-m ./glm-4-9b-chat-int4` 选择模型。
@chatvsgen 1
q chat 和 generate 有什么区别？ | 用 chat 还是 generate？
a `glm4run chat` 是终端里的对话，`glm4run generate` 只给一个回答就结束，适合脚本。
@pipe 1
h 用管道输入文本 | 从标准输入读取
q 支持管道吗？ | 能读标准输入吗？
a 用 `-` 作为提示：`cat notes.txt | glm4run generate -`。回答写到标准输出。
@batch 1
h 批量生成 | 一次处理很多问题
q 支持批量吗？
a 用 `glm4run generate --input prompts.jsonl --output answers.jsonl`。中断后可以继续。
@temperature 2
h 设置温度 | 选择温度 | 让回答更稳定
w --temperature | 温度参数
q 温度设多少？ | 温度用多少好？
a 加上 `--temperature 0.8`。数值低（如 0.2）更稳定，0 总是取最可能的词。GLM-4-9B 对话默认是 0.8。
@seed 1
h 设置随机种子 | 固定随机种子 | 让结果可重复
w --seed | 随机种子
q 为什么每次回答不一样？
a 加上 `--seed 42`，随机选择就可以重复。
@stop 1
h 设置停止词 | 使用停止字符串
w --stop | 停止字符串
a 加上 `--stop "END"`，可以多次使用。回答在那里结束，停止字符串不会显示。
@maxtokens 1
h 限制回答长度 | 让回答短一点 | 设置最大长度
w --max-tokens
q 回答可以多长？
a 加上 `--max-tokens 200`，回答最多 200 个 token。数值越大，回答可以越长。
@json 1
h 得到 JSON 输出 | 输出 JSON
w --json
q 支持 JSON 吗？
a 加上 `--json`，例如 `glm4run generate "你好" --json`。
@models 2
h 查看我的模型 | 列出模型 | 看有哪些模型
w glm4run models
q 我有哪些模型？ | 这里有哪些模型？
a 运行 `glm4run models`，它会列出这台机器上的模型。
@modelsfolder 1
h 更改模型文件夹 | 设置模型目录
w GLM4RUN_MODELS
q 模型放在哪里？ | 模型存在哪里？ | 模型文件夹在哪里？
a 模型放在 `$GLM4RUN_MODELS` 指定的文件夹；没有设置时，放在用户数据文件夹。
@choosemodel 2
h 选择模型 | 换一个模型 | 使用自己的模型
q 默认用哪个模型？ | MODEL 可以是什么？
a 写上模型：`glm4run chat MODEL` 或 `glm4run generate -m MODEL`。MODEL 是文件夹、模型名或 hub id。
@info 1
h 查看模型信息 | 了解一个模型文件夹
w glm4run info
a 运行 `glm4run info ./glm-4-9b-chat-int4`，它会说明这是什么模型。
@check 2
h 检查文件夹 | 检查模型文件 | 确认下载是否完整
w glm4run check
q 文件完整吗？ | 模型坏了吗？
a 运行 `glm4run check ./glm-4-9b-chat`，几秒钟就知道文件是否完整一致。
@doctor 2
h 自检 | 测试安装 | 检查是否正常
q 不能用了怎么办？ | 模型胡言乱语怎么办？ | 出问题了怎么办？
a 对模型文件夹运行 `glm4run check DIR`，它会告诉你文件是否完整一致。
@tokenize 1
h 查看 token | 分词 | 数 token
w glm4run tokenize
q 我的文本有多少 token？
a 运行 `glm4run tokenize "你好"`，它显示准确的编号并标出控制 token。
@vram 4
h 估算显存 | 估算内存 | 知道需要多少显存 | 看显卡够不够
q 需要多少显存？ | 需要多少内存？ | 显存够吗？ | 显存 | 我的显卡能跑吗？
a GLM-4-9B 的权重在 int4 下约 6.2 GB，int8 约 10.2 GB，bf16 为 18.8 GB。每个 token 的上下文另加 40 KiB。
@ctx 1
h 设置上下文长度 | 使用更长的上下文
w --ctx
a 加上 `--ctx 128k`，或者数字如 `--ctx 8192`。8k 是 8192，128k 是 131072 个 token。
@kvcache 2
w KV 缓存 | KV cache
q KV 缓存有多大？ | KV 缓存要多少内存？
a KV 缓存保存前面 token 的键和值。GLM-4-9B 在 bf16 下每个 token 要 40 KiB，128k 时是 5 GiB。
@cpu 2
h 在 CPU 上运行 | 不用显卡运行 | 只用 CPU
w --device cpu
q 没有显卡能用吗？ | 需要显卡吗？ | 支持 CPU 吗？
a 加上 `--device cpu`。不需要显卡；在 CPU 上最好用 4 位模型。
@cuda 2
h 在 GPU 上运行 | 使用显卡 | 用 CUDA 运行
w --device cuda | --device
q 支持 CUDA 吗？ | 支持显卡吗？
a 加上 `--device cuda`，第二块卡用 `--device cuda:1`。默认 `auto` 会自动选择。
@backend 1
h 选择后端 | 更换后端
w --backend
q 有哪些后端？
a `--backend` 可以是 auto、torch 或 reference。`auto` 自动选择，并说明选了什么。
@threads 1
h 设置线程数
w --threads
a 加上 `--threads 4`，就使用 4 个线程。
@bench 2
h 测试速度 | 做性能测试
q 速度有多快？ | 每秒多少 token？
a 运行 `glm4run generate "你好" --json`，看 `timings` 里的每秒 token 数。
@eval 1
h 评估质量 | 测量困惑度 | 比较量化前后的质量
q 量化会损失多少质量？
a `glm4run quantize` 会显示各类张量的误差，`glm4run.json` 里保存每个张量的误差。
@serve 2
h 启动服务器 | 打开网页界面 | 使用 OpenAI API
q 有网页界面吗？ | 有 API 吗？ | 有服务器吗？
a 这个版本没有服务器。可以在脚本里用 `glm4run generate --json`，或者用 vLLM 部署打包的文件夹。
@pull 2
h 下载模型 | 下载 GLM-4-9B | 获取模型
q 从哪里得到模型？ | 下载
a 从模型网站下载模型文件夹，然后对它运行 `glm4run quantize`。
@rm 1
h 删除模型 | 移除模型
a 删除它的文件夹就行。`glm4run models` 会显示模型在哪里。
@python 1
h 在 Python 里使用 | 用 Python 加载模型
w load_model
q 有 Python 接口吗？
a 在 Python 里：`from glm4run import load_model`，然后 `model = load_model("./glm-4-9b-chat-int4")`。
@exitcodes 1
w 退出码
q 退出码有哪些？
a 退出码：0 完成，1 错误，2 用法错误或放不下，130 被中断。
@debug 1
h 查看详细错误
w --debug
q 出错了怎么办？ | 报错了
a 错误信息是一行，说明该怎么做。加上 `--debug` 可以看到完整的错误。
@license 2
w 许可证
q 什么许可证？ | 是免费的吗？ | 是开源的吗？ | glm4run 用什么许可证？
a glm4run 是自由软件，采用 MIT 许可证。GLM 模型权重有自己的许可证。
@glm4run 4
w glm4run | 这个程序 | 这个工具
q 这是什么？ | glm4run 能做什么？ | glm4run 有什么用？ | 这个软件是做什么的？
a glm4run 在你自己的机器上运行 GLM-4-9B 对话模型：把它量化到 4 位或 8 位，聊天和生成文本。
@start 3
h 开始使用 | 使用 glm4run | 使用这个程序 | 运行 GLM-4-9B
q 第一步做什么？ | 从哪里开始？ | 我是新手。 | 怎么用？
a 三步：下载 GLM-4-9B 文件夹，然后 `glm4run quantize SOURCE -o DIR --bits 4`，最后 `glm4run chat DIR`。
@safe 1
q 安全吗？ | 我的数据会上传吗？ | 需要联网吗？ | 可以离线用吗？
a 模型在你自己的机器上运行。glm4run 不加载 pickle，也不运行模型文件夹里的代码。
@nofit 1
q 内存不够怎么办？ | 显存不够怎么办？ | 显存太小怎么办？
h 节省内存 | 节省显存
a 用 4 位模型和更短的 `--ctx`。每个 token 的上下文要 40 KiB。
@disksize 1
q 模型有多大？ | 需要多少硬盘空间？ | int4 模型有多大？ | GLM-4-9B 有多少 GB？
a GLM-4-9B 在 bf16 下是 18.8 GB，int8 约 10.2 GB，int4 约 6.2 GB。
@family 3
w GLM-4-9B | GLM-4 | GLM | GLM-4-9B 系列
q 支持哪些模型？ | 有哪些 GLM 模型？ | 能运行哪些模型？
a GLM-4-9B 是 94 亿参数的开放语言模型。系列有 glm-4-9b、glm-4-9b-chat、-1m、-hf、GLM-4-9B-0414 和 GLM-Z1-9B-0414。
@glmchat 1
w glm-4-9b-chat
q 聊天用哪个模型？
a glm-4-9b-chat 是 2024 年的对话模型，有 40 层，上下文是 131072 个 token（128k）。
@oneM 1
w glm-4-9b-chat-1m
q 哪个模型上下文最长？
a glm-4-9b-chat-1m 的上下文是 1048576 个 token，有 4 个 KV 头。
@m0414 1
w GLM-4-9B-0414 | 0414
a GLM-4-9B-0414 是较新的对话模型，上下文是 32768 个 token，用 YaRN 可到 131072。
@z1 1
w GLM-Z1-9B-0414 | 推理模型 | Z1
q 有推理模型吗？
a GLM-Z1-9B-0414 是推理模型。它先思考，到 `</think>` 为止，然后给出回答。
@maker 2
q GLM-4-9B 是谁做的？ | 谁开发了 GLM？ | GLM 是哪家公司的？ | 谁训练了 GLM-4-9B？
w 智谱 | THUDM
a GLM-4 模型由智谱 AI 和清华大学的 THUDM 团队开发。
@context 1
w 上下文长度
q 上下文有多长？ | 上下文是多少？
a glm-4-9b-chat 是 131072（128k），GLM-4-9B-0414 是 32768，用 YaRN 是 131072，glm-4-9b-chat-1m 是 1048576。
@layers 1
q GLM-4-9B 有多少层？ | 有多少个注意力头？ | 隐藏维度是多少？ | GLM-4-9B 的结构是什么？
a GLM-4-9B 有 40 层，隐藏维度 4096，32 个注意力头，2 个 KV 头。
@params 1
q GLM-4-9B 有多少参数？ | 有多少参数？ | 参数量是多少？
a GLM-4-9B 有 94 亿参数，其中 13.2% 在词嵌入和 lm_head 里。
@vocab 1
w 词表
q 词表有多大？ | 词表大小是多少？
a GLM-4-9B 的词表有 151552 项（含填充），分词器是字节级 BPE。
@rope 1
w RoPE | 旋转位置编码
a RoPE 按位置旋转查询和键。GLM-4-9B 只旋转 128 维中的前 64 维。
@yarn 1
w YaRN
a YaRN 把 RoPE 扩展到更长的文本。GLM-4-9B-0414 用因子 4 从 32768 扩展到 131072 个 token。
@quantwhat 2
w 量化 | 模型量化 | int4
q 为什么要量化？ | 量化有什么好处？
a 量化用更少的位保存权重，例如用 4 位代替 16 位。模型更小更快，精度略有损失。
@token 1
w token
a token 是一小段文本，比如一个词或词的一部分。模型读写的都是 token。
@llm 1
w 语言模型 | 大模型
a 语言模型一次次预测文本的下一个 token。GLM-4-9B 就是语言模型，我是一个很小的语言模型。
"""
