/** What was asked and answered about one picture, and what the next question costs. */

import { encoded } from "./picture.js";

export class Conversation {
  #url = null; // a promise of the picture
  #past = []; // [question, answer] pairs

  constructor(file = null) {
    this.file = file;
    this.#url = file && encoded(file);
  }

  /** The body of a chat that goes on with `question`. The picture stands before the first. */
  async chat(question, options) {
    const messages = [];
    for (const [asked, answered] of this.#past) {
      messages.push({ role: "user", content: asked }, { role: "assistant", content: answered });
    }
    messages.push({ role: "user", content: question });
    if (this.#url) {
      const picture = { type: "image_url", image_url: { url: await this.#url } };
      messages[0].content = [picture, { type: "text", text: messages[0].content }];
    }
    return { messages, ...options };
  }

  /** Remember an answer; one that was stopped counts as far as it came. */
  add(question, answer) {
    this.#past.push([question, answer]);
  }
}
