{{/* The prefix of all names. */}}
{{- define "lazarette.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels by which pods are selected. Call with (list . "component"). */}}
{{- define "lazarette.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object. Call with (list . "component"). */}}
{{- define "lazarette.labels" -}}
{{- $root := index . 0 -}}
{{ include "lazarette.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "lazarette.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}

{{/* What all pods share: pull secrets and the PriorityClass. Call with (list . "storage|node|control"). */}}
{{- define "lazarette.pod" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $root.Values.priorityClasses.create }}
priorityClassName: {{ include "lazarette.fullname" $root }}-{{ index . 1 }}
{{- end }}
enableServiceLinks: false
{{- end -}}

{{/* A process that needs no rights on the node. */}}
{{- define "lazarette.unprivilegedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lazarette.unprivilegedContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end -}}

{{/* Probes on the admin server. */}}
{{- define "lazarette.probes" -}}
livenessProbe:
  httpGet:
    path: /livez
    port: admin
  periodSeconds: 10
  failureThreshold: 6
  timeoutSeconds: 5
readinessProbe:
  httpGet:
    path: /readyz
    port: admin
  periodSeconds: 5
  timeoutSeconds: 3
{{- end -}}

{{- define "lazarette.driverName" -}}
csi.lazarette.io
{{- end -}}

{{- define "lazarette.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ include "lazarette.driverName" . }}
{{- end -}}
