use super::*;
use serde_json::json;

fn args(value: serde_json::Value) -> TemplateArgs {
    value.as_object().unwrap().clone()
}

fn render(source: &str, messages: &[Message]) -> Result<String, ChatError> {
    ChatTemplate::new(source, Some("<s>"), None)?.render(messages, false, &Map::new())
}

/// Renderings by Jinja2, made by `tests/data/make_fixtures.py`.
#[test]
fn renders_as_jinja2_does() {
    #[derive(Deserialize)]
    struct Case {
        name: String,
        template: String,
        messages: Vec<Message>,
        add_generation_prompt: bool,
        extra: TemplateArgs,
        rendered: String,
    }
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/data/chats.json")).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let template = ChatTemplate::new(&case.template, Some("<s>"), Some("</s>")).unwrap();
        let rendered = template.render(&case.messages, case.add_generation_prompt, &case.extra).unwrap();
        assert_eq!(rendered, case.rendered, "{}", case.name);
    }
}

#[test]
fn arguments_reach_the_template() {
    let template =
        ChatTemplate::new("{{ bos_token }}{{ mode }}{{ eos_token }}{{ tools }}", Some("<s>"), None);
    let extra = args(json!({"mode": "fast", "tools": "mine"}));
    assert_eq!(template.unwrap().render(&[], false, &extra).unwrap(), "<s>fastmine");
}

#[test]
fn nothing_is_escaped() {
    let message = Message::new("user", "<b> & \"'");
    assert_eq!(render("{{ messages[0].content }}", &[message]).unwrap(), "<b> & \"'");
}

#[test]
fn a_date_is_written() {
    let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
    assert!(year.len() == 4 && year.as_str() >= "2024", "{year}");
}

#[test]
fn errors_name_the_template_and_the_line() {
    let error = render("a\n{% if %}", &[]).unwrap_err();
    assert!(matches!(error, ChatError::Syntax { line: 2, .. }), "{error}");
    assert!(error.to_string().starts_with("chat_template:2: "), "{error}");

    let error =
        render("{% set x = 1 %}\n\n{{ raise_exception('roles must ' ~ 'alternate') }}", &[]).unwrap_err();
    assert!(
        matches!(&error, ChatError::Refused { line: 3, message, .. } if message == "roles must alternate")
    );

    let error = render("\n{{ messages.nothing.at_all }}", &[]).unwrap_err();
    assert!(matches!(error, ChatError::Render { line: 2, .. }), "{error}");

    let error = render("{{ strftime_now('%Q') }}", &[]).unwrap_err();
    assert!(error.to_string().contains("%Q"), "{error}");
    assert!(render("{{ 1 | tojson(bogus=2) }}", &[]).is_err());
    assert!(render("{{ [1] | tojson(separators=['a']) }}", &[]).is_err());
}

#[test]
fn generation_tags_leave_no_trace() {
    let of = without_generation_tags;
    assert_eq!(of("a{%- generation -%} b {% endgeneration +%}c"), "a{%- if true -%} b {% endif +%}c");
    assert_eq!(
        of("{% if generation %}{{ generation }}{% endif %}{% x"),
        "{% if generation %}{{ generation }}{% endif %}{% x"
    );
}

#[test]
fn messages_keep_fields_that_are_not_known() {
    let message: Message = serde_json::from_value(json!({"role": "assistant", "tool_calls": [1]})).unwrap();
    assert_eq!(message.content, None);
    assert_eq!(
        render("{{ messages[0].content is none }} {{ messages[0].tool_calls | tojson }}", &[message])
            .unwrap(),
        "True [1]"
    );
}

#[test]
fn tokenizer_config_in_both_spellings() {
    let of = |v: serde_json::Value| TokenizerConfig::from_json(v.to_string().as_bytes());
    let plain = of(json!({"bos_token": "<s>", "eos_token": null, "chat_template": "x", "other": 1})).unwrap();
    assert_eq!(
        (plain.bos_token.as_deref(), plain.eos_token, plain.chat_template.as_deref()),
        (Some("<s>"), None, Some("x"))
    );
    let rich = of(json!({
        "bos_token": {"content": "<s>", "lstrip": false},
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    }))
    .unwrap();
    assert_eq!((rich.bos_token.as_deref(), rich.chat_template.as_deref()), (Some("<s>"), Some("d")));
    assert!(of(json!({"bos_token": 3})).is_err());
}
