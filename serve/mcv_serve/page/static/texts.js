/** All that the page says, in its languages. `tell` says it, and again when the language changes. */

const TEXTS = {
  en: {
    title: "Ask about a picture", skip: "Skip to the question", language: "Language",
    key: "API key", useKey: "Use it", keyHint: "This server answers only who has a key. It is kept until the page is closed.",
    badKey: "The server does not take this key.",
    picture: "Picture", dropHint: "Drop a picture here, paste one, or choose it.", choose: "Choose a picture",
    photograph: "Photograph", shutter: "Take the picture", cancel: "Cancel",
    noCamera: "There is no camera that may be used.", unshowable: "This browser cannot show the picture.",
    notOneFile: "Drop one picture at a time.",
    tooLarge: "The picture has {size} MB; this server takes {most}.",
    slices: "Slices at most", mode: "Downsampling", modeDefault: "As the model says",
    whole: "The picture is seen whole: {tokens} visual tokens.",
    cut: "An overview ({overview}) and {columns} × {rows} slices: {tokens} visual tokens.",
    price: "Visual tokens: {visual}. With the conversation: {input} of {context}.",
    pricePicture: "Visual tokens: {visual} of {context}.",
    conversation: "Conversation", question: "Question", questionHint: "What does the text say?",
    keys: "Enter asks, Shift+Enter begins a line, Esc stops.",
    asJson: "Answer as JSON", useSchema: "Hold the answer to this schema", schema: "JSON schema",
    badSchema: "This is no JSON object: {why}",
    send: "Ask", stop: "Stop", anew: "New conversation",
    reading: "The picture and the question are being read…", answering: "Answering…",
    done: "Answered in {seconds} s.", stopped: "Stopped.", cutShort: "The answer was ended early ({why}).",
    lost: "The connection to the server is lost.",
    stats: "Encoded in {encode} s. Prompt: {read} read in {prefill} s, {known} known already. Answer: {made} in {decode} s ({rate}/s).",
  },
  zh: {
    title: "看图提问", skip: "跳到问题", language: "语言",
    key: "API 密钥", useKey: "使用", keyHint: "此服务器仅对持有密钥者开放。密钥只保留到页面关闭。",
    badKey: "服务器不接受此密钥。",
    picture: "图片", dropHint: "把图片拖到这里、粘贴，或选择图片。", choose: "选择图片",
    photograph: "拍照", shutter: "拍摄", cancel: "取消",
    noCamera: "没有可用的摄像头。", unshowable: "浏览器无法显示这张图片。",
    notOneFile: "一次请只拖入一张图片。",
    tooLarge: "图片有 {size} MB，此服务器最多接受 {most} MB。",
    slices: "最多切片数", mode: "下采样", modeDefault: "按模型默认",
    whole: "整图输入：{tokens} 个视觉 token。",
    cut: "缩略图（{overview}）加 {columns} × {rows} 个切片：{tokens} 个视觉 token。",
    price: "视觉 token：{visual}。连同对话：{input} / {context}。",
    pricePicture: "视觉 token：{visual} / {context}。",
    conversation: "对话", question: "问题", questionHint: "图中的文字是什么？",
    keys: "Enter 提问，Shift+Enter 换行，Esc 停止。",
    asJson: "以 JSON 回答", useSchema: "按此模式约束回答", schema: "JSON 模式（schema）",
    badSchema: "这不是 JSON 对象：{why}",
    send: "提问", stop: "停止", anew: "新对话",
    reading: "正在读取图片和问题……", answering: "正在回答……",
    done: "用时 {seconds} 秒。", stopped: "已停止。", cutShort: "回答提前结束（{why}）。",
    lost: "与服务器的连接已断开。",
    stats: "编码 {encode} 秒。提示：读取 {read} 个 token，用时 {prefill} 秒，已知 {known} 个。回答：{made} 个 token，{decode} 秒（每秒 {rate} 个）。",
  },
};

let language = "en";
const told = new Map();

function said(name, values) {
  const numbers = new Intl.NumberFormat(language, { maximumFractionDigits: 2 });
  return TEXTS[language][name].replace(/{(\w+)}/g, (_, key) => {
    const value = values[key];
    return typeof value === "number" ? numbers.format(value) : (value ?? "–");
  });
}

/** Let an element say a text of that name, or nothing. */
export function tell(element, name, values = {}) {
  if (name) {
    told.set(element, [name, values]);
    element.textContent = said(name, values);
  } else {
    told.delete(element);
    element.textContent = "";
  }
}

/** Say everything in another language. */
export function speak(wanted) {
  language = wanted in TEXTS ? wanted : "en";
  document.documentElement.lang = language;
  document.title = TEXTS[language].title;
  for (const element of document.querySelectorAll("[data-text]")) told.set(element, [element.dataset.text, {}]);
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = TEXTS[language][element.dataset.placeholder];
  }
  for (const [element, [name, values]] of told) {
    if (element.isConnected) element.textContent = said(name, values);
    else told.delete(element);
  }
  return language;
}
