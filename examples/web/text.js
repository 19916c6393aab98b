// Text in, token ids out, and back: the folder's tokenizer and chat template.
import { Template } from "./vendor/jinja.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { fetchJson, fetchText } from "./files.js";

export class Text {
  /** files: names that the manifest lists. */
  static async load(folder, files) {
    const config = "tokenizer_config.json" in files ? await fetchJson(new URL("tokenizer_config.json", folder)) : {};
    const tokenizer = new Tokenizer(await fetchJson(new URL("tokenizer.json", folder)), config);
    const template =
      "chat_template.jinja" in files
        ? await fetchText(new URL("chat_template.jinja", folder))
        : config.chat_template;
    return new Text(tokenizer, config, template);
  }

  constructor(tokenizer, config, template) {
    this.tokenizer = tokenizer;
    this.config = config;
    this.template = template ? new Template(template) : null;
  }

  /** Token ids of a question, as the chat template asks it; as it stands if there is no template. */
  question(content) {
    if (!this.template) return this.encode(content, true);
    const variables = { bos_token: content_of(this.config.bos_token), eos_token: content_of(this.config.eos_token) };
    const messages = [{ role: "user", content }];
    // The template writes the special tokens itself, the first one too.
    return this.encode(this.template.render({ messages, add_generation_prompt: true, ...variables }), false);
  }

  encode(text, special) {
    return this.tokenizer.encode(text, { add_special_tokens: special }).ids;
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

/** A special token is a text, or an object that holds it. */
function content_of(token) {
  return typeof token === "object" && token !== null ? token.content : token;
}
