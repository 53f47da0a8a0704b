/** What the alert rules and the dashboard ask Prometheus. */
import {readFileSync} from 'node:fs';
import path from 'node:path';
import {ROOT, object, objects} from './rendered.js';

interface Rule {
	readonly alert: string;
	readonly expr: string;
	readonly annotations: Readonly<Record<string, string>>;
}

export interface RuleGroups {
	readonly groups: ReadonlyArray<{readonly name: string; readonly rules: readonly Rule[]}>;
}

interface Panel {
	readonly title: string;
	readonly targets?: ReadonlyArray<{readonly expr: string}>;
}

export interface Expression {
	readonly where: string;
	readonly text: string;
}

export function ruleGroups(): RuleGroups {
	return object<{spec: RuleGroups}>(objects('monitoring'), 'PrometheusRule').spec;
}

export function rules(): readonly Rule[] {
	return ruleGroups().groups.flatMap(({rules}) => rules);
}

/** Grafana's variables are filled in. */
export function expressions(): readonly Expression[] {
	const {panels, templating} = JSON.parse(readFileSync(path.join(ROOT, 'daemonset/monitoring/dashboard.json'), 'utf8')) as {
		readonly panels: readonly Panel[]; readonly templating: {readonly list: ReadonlyArray<{readonly name: string; readonly definition?: string}>};
	};
	const fill = (text: string) => text.replaceAll('$__rate_interval', '5m').replaceAll(/\$(?:node|pod)\b/g, '.*');
	return [
		...rules().map(({alert, expr}) => ({where: `alert ${alert}`, text: expr})),
		...panels.flatMap(({title, targets = []}) => targets.map(({expr}) => ({where: `panel ${title}`, text: fill(expr)}))),
		...templating.list.flatMap(({name, definition}) => {
			const [, metric, label] = /^label_values\((.*), (\w+)\)$/.exec(definition ?? '') ?? [];
			return metric === undefined ? [] : [{where: `variable ${name}`, text: `count by (${label}) (${fill(metric)})`}];
		}),
	];
}
